"""A server on a real socket inside the test process, what holds its work still, and the numbers it must give."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from oracle import Oracle as Oracle
from prometheus_client.parser import text_string_to_metric_families

import service.app
from service.catalog.model import ServedModel
from service.core.clock import Clock
from service.engine.base import Rows
from service.settings import Settings
from service.transport.uvicorn_config import uvicorn_config

_PATIENCE = 20.0

RAW = {"Content-Type": "application/octet-stream"}


def until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Returns as soon as the condition holds; fails when it does not come true."""
    end = time.monotonic() + _PATIENCE
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true"
        pause.wait(0.001)


class _Announcing(uvicorn.Server):
    """A uvicorn server that says when it listens, or that it never will."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
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
        application, self.server = service.app.build(settings, clock)
        self.uvicorn = _Announcing(uvicorn_config(application, self.server, "127.0.0.1", 0))
        self._thread = threading.Thread(target=self.uvicorn.run, name="server", daemon=True)
        self._thread.start()
        assert self.uvicorn.announced.wait(_PATIENCE)
        assert self.uvicorn.started, "the server did not start"
        self.port: int = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.address}"

    def model(self, name: str, version: str | None = None) -> ServedModel:
        return self.server.catalog.resolve(name, version)

    def rescan(self) -> None:
        """What SIGHUP does. Returns at once; the rescan is done soon."""
        self.uvicorn.loop.call_soon_threadsafe(self.server.catalog.request_rescan)

    def rescan_now(self) -> None:
        """Returns when a whole rescan is done."""
        rescan = self.server.catalog.rescan()
        asyncio.run_coroutine_threadsafe(rescan, self.uvicorn.loop).result(_PATIENCE)

    def stop(self) -> None:
        """Ends the server and checks what it leaves behind."""
        self.uvicorn.should_exit = True
        self._thread.join(_PATIENCE)
        assert not self._thread.is_alive(), "the server did not stop"
        assert not self.server.crashed
        for model in self.server.catalog:
            assert model.scheduler.in_flight == 0, model
            model.scheduler.check_invariants()

    @contextmanager
    def holding(self, name: str, version: str | None = None) -> Iterator["HeldStore"]:
        """While inside, a batch of the model is run but not committed: its chunks stay in flight."""
        loop = self.model(name, version).loop
        before = loop.store
        held = HeldStore()
        loop.store = held
        try:
            yield held
        finally:
            loop.store = before
            held.release()


class HeldStore:
    """Commits nothing until released."""

    durability = "memory"

    def __init__(self) -> None:
        self._released = asyncio.Event()
        self._reached = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def commit(self, batch: Rows) -> None:
        self._loop = asyncio.get_running_loop()
        self._reached.set()
        await self._released.wait()

    def wait(self) -> None:
        """Returns when a batch is at its commit."""
        assert self._reached.wait(_PATIENCE), "no batch was run"

    def release(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._released.set)
        else:
            self._released.set()


class SlowStore:
    """Takes its time over a commit, as a store on another machine does: meanwhile work gathers for the next batch."""

    durability = "memory"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def commit(self, batch: Rows) -> None:
        await asyncio.sleep(self.seconds)


def metrics(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """A scrape's samples by name and labels. Raises if it is not Prometheus's text format."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of the samples of that name that have these labels."""
    wanted = set(labels.items())
    return sum(value for (found, has), value in metrics(text).items() if found == name and wanted <= has)


#: The fixture `serve`: a clock or None, and settings by name.
Serve = Callable[..., Running]
