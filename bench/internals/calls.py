"""Counts the calls and writes of a step: budgets that hold on any machine, under any load.

    python -m bench.internals.calls [--write] [--budgets FILE]

The real application answers real requests; only sockets, time and the store's thread are replaced. A call counts if the
caller or the callee is Unroll's code, because calls within libraries change with their versions.
"""

import argparse
import asyncio
import gc
import json
import sys
import tempfile
from base64 import b64encode
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from uvicorn.server import ServerState

from bench.http_client import infer, post
from bench.subjects import infer_request
from bench.websocket_client import handshake, opening_message, steps_frame
from unroll.service import app
from unroll.service.access.keys import INFER, new_key
from unroll.service.core import turns
from unroll.service.core.clock import ManualClock
from unroll.service.settings import Settings
from unroll.service.store import embedded_store
from unroll.service.telemetry import logs
from unroll.service.transport.connections import ConnectionLimits
from unroll.service.transport.uvicorn_config import uvicorn_config

ROOT = Path(__file__).parents[2]
BUDGETS = ROOT / "bench" / "budgets.json"
#: The Python version. Versions make different calls, so each has its own budgets.
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHON, C, WRITES = KINDS = ("Python", "C", "writes")

_MODEL = "policy"
_SESSIONS = f"/v1/models/{_MODEL}/sessions"
_ROW = np.ones((1, 3), np.float32)
_TOGETHER, _CROWD, _ENTRIES, _STEPS = 16, 512, 256, 64
#: Turns of the event loop after which all work is done.
_TURNS = 100
#: Requests before the one that counts, to fill all caches.
_WARM_UP = 4
#: The number of functions to name when there are too many calls.
_NAMED = 5

#: Counts by kind and function, separated by a space: the callee if it is a Python function, otherwise the caller.
Counts = Counter[str]
#: Counts by path.
Figures = dict[str, Counts]


class Profile:
    """Counts the events of `sys.setprofile` in this thread."""

    def __init__(self) -> None:
        self.counts: Counts = Counter()

    def __call__(self, frame: FrameType, event: str, called: object) -> None:
        if event == "c_call" and _is_ours(frame):
            self._count(C, frame)
        elif event == "call" and (_is_ours(frame) or (_is_ours(frame.f_back) and frame.f_globals is not globals())):
            self._count(PYTHON, frame)

    def _count(self, kind: str, frame: FrameType) -> None:
        name = f"{_module(frame)}.{frame.f_code.co_qualname}"
        self.counts[f"{kind} {name.removeprefix('unroll.service.')}"] += 1


def _is_ours(frame: FrameType | None) -> bool:
    return frame is not None and _module(frame).startswith("unroll.")


def _module(frame: FrameType) -> str:
    module: str = frame.f_globals.get("__name__", "")
    return module


# ── replacements ─────────────────────────────────────────────────────────────────────────────────


class StillLoop(asyncio.SelectorEventLoop):
    """An event loop with a stopped clock, so that only requests cause work."""

    def time(self) -> float:
        return 0.0


class Connection(asyncio.Transport):
    """Records the server's writes."""

    def __init__(self, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self._is_closing = False
        self.set_protocol(protocol)
        protocol.connection_made(self)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def receive(self, data: bytes) -> None:
        assert isinstance(self._protocol, asyncio.Protocol)
        self._protocol.data_received(data)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._protocol.connection_lost(None)

    def is_closing(self) -> bool:
        return self._is_closing

    def is_reading(self) -> bool:
        return True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


class NoThread:
    """Replaces the store's thread: its calls run in the event loop after all other work, and count as well."""

    def __init__(self, name: str) -> None: ...

    def call(self, work: Callable[[], Any]) -> "asyncio.Task[Any]":
        return asyncio.create_task(self._run(work))

    async def _run(self, work: Callable[[], Any]) -> Any:
        await _turn(_TURNS // 4)
        return work()

    def end(self) -> None: ...


async def _turn(times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


# ── the paths ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Request:
    """A request on a connection; `answer` is the expected beginning of its answer."""

    connection: Connection
    content: bytes
    answer: bytes = b"HTTP/1.1 20"


async def send(requests: Sequence[Request]) -> int:
    """Send requests that arrive in one turn. Returns the number of the server's writes until all are answered."""
    for request in requests:
        request.connection.written.clear()
        request.connection.receive(request.content)
    await _turn(_TURNS)
    for request in requests:
        written = b"".join(request.connection.written)
        if not written.startswith(request.answer):
            raise ValueError(f"{request.content[:200]!r} was answered by {written[:400]!r}")
    return sum(len(request.connection.written) for request in requests)


async def count(requests: Sequence[Request]) -> Counts:
    """Count the calls and writes of repeatable requests."""
    for _ in range(_WARM_UP):
        await send(requests)
    profile = Profile()
    sys.setprofile(profile)
    try:
        profile.counts[WRITES] = await send(requests)
    finally:
        sys.setprofile(None)
    return profile.counts


class Server:
    """The application with one model and connections without sockets."""

    def __init__(self, repository: Path, **settings: object) -> None:
        checked = Settings.model_validate({"repository": repository, "device": "cpu", **settings})
        self._application, state = app.build(checked, ManualClock())
        for model in state.models:
            model.loop._cost = lambda rows, steps: 0.0  # a batch that happens to seem long would run in a thread
        self._config = uvicorn_config(self._application, state, "", 0, ConnectionLimits.of(checked))
        self._config.load()
        self._connections: list[Connection] = []

    def run(self, paths: Callable[["Server"], Awaitable[Figures]]) -> Figures:
        with asyncio.Runner(loop_factory=StillLoop) as runner:
            return runner.run(self._run(paths))

    async def _run(self, paths: Callable[["Server"], Awaitable[Figures]]) -> Figures:
        async with self._application.router.lifespan_context(self._application):
            try:
                return await paths(self)
            finally:
                for connection in self._connections:
                    connection.close()
                await _turn(_TURNS)

    def connect(self) -> Connection:
        protocol = self._config.http_protocol_class(self._config, ServerState(), {})  # type: ignore[call-arg]
        self._connections.append(Connection(protocol))
        return self._connections[-1]

    def request(self, path: str, body: bytes | Mapping[str, object], **headers: str) -> Request:
        return Request(self.connect(), post(path, body, headers))

    async def step(self, session: str, body: bytes | Mapping[str, object], **headers: str) -> Request:
        """A step of a new session."""
        await send([self.request(_SESSIONS, {"session_id": session}, **headers)])
        return self.request(f"{_SESSIONS}/{session}/steps", body, **headers)

    async def infer(self, sequence: int) -> Request:
        """A step of a new sequence of the Open Inference Protocol."""
        connection = self.connect()
        await send([Request(connection, infer_request(_MODEL, sequence, _ROW[0], start=True))])
        return Request(connection, infer_request(_MODEL, sequence, _ROW[0]))

    async def frame(self, handles: Sequence[int]) -> Request:
        """A frame with one step of each new session on a new stream."""
        connection = self.connect()
        head = handshake(f"/v1/models/{_MODEL}/stream", b64encode(bytes(16)))
        await send([Request(connection, head, b"HTTP/1.1 101")])
        await send([Request(connection, opening_message("streamed", handles), b"\x81")])
        return Request(connection, steps_frame(handles, _ROW.repeat(len(handles), 0)), b"\x82")


async def _in_memory(server: Server) -> Figures:
    raw, text = _ROW.tobytes(), {"inputs": _ROW.tolist()}
    together = [await server.step(f"together-{i}", raw) for i in range(_TOGETHER)]
    in_json = [await server.step(f"json-{i}", text) for i in range(_TOGETHER)]
    crowd = [await server.step(f"crowd-{i}", raw) for i in range(_CROWD)]
    inferred = [await server.infer(i) for i in range(1, _TOGETHER + 1)]
    whole = server.connect()
    await send([Request(whole, infer_request(_MODEL, _TOGETHER + 1, _ROW[0], start=True))])
    of_one = Request(whole, infer(_MODEL, _ROW, sequence_id=_TOGETHER + 2, sequence_start=True, sequence_end=True))
    sequence = server.request(f"/v1/models/{_MODEL}/sequences", _STEPS * raw, **{"unroll-steps": str(_STEPS)})
    return {
        f"{_TOGETHER} raw steps in one turn": await count(together),
        f"{_TOGETHER} JSON steps in one turn": await count(in_json),
        f"{_TOGETHER} infer steps in one turn": await count(inferred),
        f"{_CROWD} raw steps in one turn": await count(crowd),
        "raw step": await count([await server.step("raw", raw)]),
        "JSON step": await count(in_json[:1]),
        "infer step": await count(inferred[:1]),
        "infer step that starts and ends a sequence": await count([of_one]),
        f"sequence of {_STEPS} steps": await count([sequence]),
        "session opened": await count([server.request(_SESSIONS, {})]),
        "frame of 1": await count([await server.frame([_ENTRIES])]),
        f"frame of {_ENTRIES}": await count([await server.frame(range(_ENTRIES))]),
    }


async def _durable(server: Server) -> Figures:
    return {"durable raw step": await count([await server.step("stored", _ROW.tobytes())])}


def measure() -> Figures:
    """Count each path."""
    gc.disable()  # it would run finalizers at random points
    embedded_store.__dict__["DaemonThread"] = NoThread
    turns.__dict__["_LONG_SECONDS"] = inf  # no slice waits for the clock
    with tempfile.TemporaryDirectory(prefix="calls-") as name:
        folder = Path(name)
        repository, keys = folder / "repository", folder / "keys.toml"
        repository.mkdir()
        (repository / _MODEL).symlink_to(ROOT / "examples" / "repository" / _MODEL)
        secret, entry = new_key("counted", "tenant", [INFER])
        keys.write_text(entry)

        async def with_key(server: Server) -> Figures:
            step = await server.step("keyed", _ROW.tobytes(), authorization=f"Bearer {secret}")
            return {"raw step with an API key": await count([step])}

        figures = Server(repository).run(_in_memory)
        figures |= Server(repository, keys=keys).run(with_key)
        return figures | Server(repository, store=f"file://{folder / 'store'}").run(_durable)


# ── the budgets ──────────────────────────────────────────────────────────────────────────────────


def total(counts: Counts, kind: str) -> int:
    return sum(number for key, number in counts.items() if key.startswith(kind))


def table(budgets: Figures, now: Figures) -> str:
    """Each path with its budget and its count of each kind."""
    lines = [f"{'':<44}" + "".join(f"{kind:>10}{'now':>7}" for kind in KINDS)]
    for path, counts in now.items():
        pairs = [(total(budgets[path], kind), total(counts, kind)) for kind in KINDS]
        lines.append(f"{path:<44}" + "".join(f"{may:>10}{takes:>7}" for may, takes in pairs))
    return "\n".join(lines)


def excesses(budgets: Figures, now: Figures) -> list[str]:
    """The exceeded budgets, with the functions that grew most."""
    found = []
    for path, counts in now.items():
        grown = counts - budgets[path]
        for kind in KINDS:
            may, takes = total(budgets[path], kind), total(counts, kind)
            if takes > may:
                found.append(f"{path}: {kind} {takes}, the budget is {may}")
                named = [(key, n) for key, n in grown.most_common() if key.startswith(kind)][:_NAMED]
                found += [f"    +{n} {key}" for key, n in named]
    return found


def read(content: Mapping[str, Any]) -> Figures:
    """The budgets of a Python version, in the format of `written`."""
    figures: Figures = {path: Counter() for path in content["paths"]}
    for key, numbers in content["counts"].items():
        for counts, number in zip(figures.values(), numbers.split(), strict=True):
            counts[key] = int(number)
    return figures


def written(figures: Figures) -> dict[str, Any]:
    """One line per function, with its counts in the order of the paths."""
    keys = sorted({key for counts in figures.values() for key in counts})
    rows = {key: " ".join(str(counts[key]) for counts in figures.values()) for key in keys}
    return {"paths": [*figures], "counts": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.internals.calls", description=__doc__.partition("\n")[0])
    parser.add_argument("--budgets", type=Path, default=BUDGETS, metavar="FILE")
    parser.add_argument("--write", action="store_true", help="what is counted now becomes the budgets")
    arguments = parser.parse_args(argv)
    logs.configure("warning")
    file: Path = arguments.budgets
    content = json.loads(file.read_text()) if file.exists() else {}
    if not arguments.write and VERSION not in content:
        print(f"skipped: {file.name} has no budgets for Python {VERSION}; --write adds them")
        return 0
    now = measure()
    if arguments.write:
        content[VERSION] = written(now)
        file.write_text(json.dumps(dict(sorted(content.items())), indent=1) + "\n")
    budgets = {path: Counter[str]() for path in now} | read(content[VERSION])
    print(f"Python {VERSION}: calls of Python functions, of C functions, writes to connections")
    print(table(budgets, now))
    if over := excesses(budgets, now):
        print("", *over, "If it is worth that, --write makes it the budget.", sep="\n", file=sys.stderr)
        return 1
    if any(excesses(now, {path: counts}) for path, counts in budgets.items() if path in now):
        print("Some are below: --write keeps what was gained.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
