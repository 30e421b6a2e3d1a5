"""A server on a real socket in the test process, and an engine that holds back results."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, ClassVar

import quick_servers
from oracle import Oracle as Oracle
from prometheus_client.parser import text_string_to_metric_families
from waiting import PATIENCE

from unroll.bundle import Content
from unroll.bundle.verification import Differences
from unroll.service import app
from unroll.service.access.certificate import Tls
from unroll.service.core.clock import Clock
from unroll.service.engine.engine import BatchResult, Rows
from unroll.service.models import loading
from unroll.service.models.served_model import ServedModel
from unroll.service.models.trial import TrialProcess, Trials
from unroll.service.models.trial_process import TrialLimits
from unroll.service.scheduler.loop import Loop
from unroll.service.settings import Settings
from unroll.service.transport.connections import ConnectionLimits
from unroll.service.transport.server import DrainingServer
from unroll.service.transport.uvicorn_config import operator_config, uvicorn_config
from unroll.service.workers import bind

quick_servers.install()


class _SharedTrialProcess(TrialProcess):
    """One trial process for all servers of this process, because it takes longer to start than a server."""

    def close(self) -> None: ...


class _SharedTrials(Trials):
    """Skip bundles that already passed with the same limits in another server of this process."""

    _PASSED: ClassVar[dict[tuple[TrialLimits, str], Differences]] = {}

    def prove(self, content: Content, seconds: float | None = None) -> Differences:
        key = self.limits, content.identity
        if key not in self._PASSED:
            self._PASSED[key] = super().prove(content, seconds)
        return self._PASSED[key]


loading.Trials = partial(_SharedTrials, start=cache(_SharedTrialProcess))  # type: ignore[assignment, misc]

RAW = {"Content-Type": "application/octet-stream"}


def raw_steps(x: Sized) -> dict[str, str]:
    """Return the headers of a request with the raw bytes of x, (time, ...)."""
    return {**RAW, "Unroll-Steps": str(len(x))}


class _Announcing(DrainingServer):
    """Sets `announced` once it listens or has failed to."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.announced = threading.Event()
        self.loop: asyncio.AbstractEventLoop

    async def startup(self, sockets: list | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        try:
            await super().startup(sockets=sockets)
        finally:
            self.announced.set()


class Running:
    """One server, from construction to `stop`."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        application, self.server = app.build(settings, clock)
        files = settings.tls_files()
        tls = None if files is None else Tls(files)
        config = uvicorn_config(application, self.server, "127.0.0.1", 0, ConnectionLimits.of(settings), tls)
        if "keep_alive" not in settings.model_fields_set:
            config.timeout_keep_alive = PATIENCE  # keep connections of a client that was starved of CPU
        operator = None
        if settings.admin_port is not None:
            listener = bind(settings.admin_host, settings.admin_port)
            operator = (
                operator_config(config, application.state.operator, self.server, ConnectionLimits.of(settings)),
                [listener],
            )
            self.operator_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        times = settings.drain_delay, settings.drain_timeout
        self.uvicorn = _Announcing(config, self.server, *times, operator=operator)
        self._thread = threading.Thread(target=self.uvicorn.run, name="server", daemon=True)
        self._thread.start()
        assert self.uvicorn.announced.wait(PATIENCE)
        assert self.uvicorn.started, "the server did not start"
        self.port: int = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http{'s' if settings.tls_cert else ''}://{self.address}"

    def model(self, name: str, version: str | None = None) -> ServedModel:
        return self.server.models.resolve(name, version)

    def rescan_now(self) -> None:
        """Run a rescan to completion."""
        rescan = self.server.repository.rescan()
        asyncio.run_coroutine_threadsafe(rescan, self.uvicorn.loop).result(PATIENCE)

    def stop(self) -> None:
        """Stop the server and check for leaks."""
        self.uvicorn.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server did not stop"
        assert not self.server.crashed
        for model in self.server.models:
            assert model.scheduler.in_flight == 0, model
            model.scheduler.check_invariants()

    def connection_of(self, client: socket.socket) -> Any:
        """Return the protocol of this client's connection, which is already in use."""
        address = client.getsockname()
        (found,) = [one for one in [*self.uvicorn.server_state.connections] if one.client == address]
        return found

    def keep_little_for(self, client: socket.socket) -> None:
        """Shrink the kernel's buffers for data sent to this client, on a connection already in use."""
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sends = self.connection_of(client).transport.get_extra_info("socket")
        with socket.fromfd(sends.fileno(), socket.AF_INET, socket.SOCK_STREAM) as copy:
            copy.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    @contextmanager
    def in_one_turn(self) -> Iterator[None]:
        """Let the server read everything sent inside the block in one turn."""
        paused, go_on = threading.Event(), threading.Event()

        def pause() -> None:
            paused.set()
            go_on.wait(PATIENCE)

        self.uvicorn.loop.call_soon_threadsafe(pause)
        try:
            assert paused.wait(PATIENCE)
            yield
        finally:
            go_on.set()

    @contextmanager
    def holding(self, name: str, version: str | None = None) -> Iterator["HeldEngine"]:
        """Hold back the model's results inside the block, so that chunks stay in flight."""
        loop = self.model(name, version).loop
        with HeldEngine(loop) as held:
            yield held


class HeldEngine:
    """Replaces a loop's engine: runs batches in the engine's thread and returns no result until released."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._engine, self._cost = loop.engine, loop._cost
        self._released = threading.Event()
        self.reached = threading.Event()

    def __enter__(self) -> "HeldEngine":
        self._loop.engine, self._loop._cost = self, lambda rows, steps: 1.0
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.engine, self._loop._cost = self._engine, self._cost
        self.release()

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def launch(self, rows: Rows) -> None: ...

    def run(self, rows: Rows) -> BatchResult:
        result = self._engine.run(rows)
        self.reached.set()
        assert self._released.wait(PATIENCE)
        return result

    def wait(self) -> None:
        """Wait until a batch has run."""
        assert self.reached.wait(PATIENCE), "no batch was run"

    def release(self) -> None:
        self._released.set()


class SlowEngine(HeldEngine):
    """Replaces a loop's engine by one that takes `seconds` per batch, so that work accumulates meanwhile."""

    def __init__(self, loop: Loop, seconds: float) -> None:
        super().__init__(loop)
        self._seconds = seconds

    def run(self, rows: Rows) -> BatchResult:
        self._released.wait(self._seconds)
        return self._engine.run(rows)


def metrics(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Parse a scrape into samples by name and labels. Raises if the text is not in Prometheus format."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def metric(text: str, name: str, **labels: str) -> float:
    """Sum the samples with this name and these labels."""
    wanted = set(labels.items())
    return sum(value for (found, has), value in metrics(text).items() if found == name and wanted <= has)


#: The type of the fixture `serve`, called with a clock or None, and settings by name.
Serve = Callable[..., Running]
