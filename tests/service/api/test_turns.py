"""No legal request blocks the event loop for long: whatever its size, other requests get turns in between.

A real server reports the processor time of its longest turn. The limit is a multiple of the time this machine needs to
parse the largest allowed JSON body, which cannot be split.
"""

import asyncio
import gzip
import json
import selectors
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from time import thread_time

import httpx
import numpy as np
import orjson
import pytest
import serving
from raw_http import Wire
from serving import RAW, Running, raw_steps
from streams import frame
from websockets.sync.client import ClientConnection, connect

from unroll.service.api.bodies import MAX_ITEMS
from unroll.service.api.stream.allowance import Allowance
from unroll.service.protocol.frames import MAX_ENTRIES
from unroll.service.settings import Settings

# Measures time, if only as a ratio, so it must not share the CPU with other tests.
pytestmark = pytest.mark.long

#: Multiple of the parsing time of the largest body, about 20 ms; another turn converts its values to arrays.
_TIMES = 4.0
#: Number of runs; the minimum counts, as the garbage collector and other servers in this process add noise.
_TRIES = 5
_AT_ONCE = 32
_JSON = {"Content-Type": "application/json"}
_X = np.random.default_rng(1).standard_normal((65_536, 3)).astype("<f4")
_STRINGS = ",".join(['["a","b",1]'] * 60_000)
_HANDLES = range(MAX_ENTRIES)


@cache
def rows(count: int = 65_000) -> str:
    """Steps as JSON; 65,000 is the most its limit of values allows."""
    return ",".join(f"[{a:.3f},{b:.3f},{c:.3f}]" for a, b, c in _X[:count].tolist())


class Stopwatch(selectors.DefaultSelector):
    """Measures one event loop. longest: the processor time of the longest turn, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = self._began = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.longest = max(self.longest, thread_time() - self._began)
        found = super().select(timeout)
        self._began = thread_time()
        return found


@pytest.fixture(scope="module")
def stopwatch() -> Stopwatch:
    return Stopwatch()


@pytest.fixture(scope="module")
def watched(few: Path, stopwatch: Stopwatch) -> Iterator[Running]:
    make = serving.uvicorn_config

    def config(*arguments: object) -> object:
        made = make(*arguments)  # type: ignore[arg-type]
        made.get_loop_factory = lambda: lambda: asyncio.SelectorEventLoop(stopwatch)  # type: ignore[method-assign]
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "uvicorn_config", config)
        running = Running(Settings(repository=few, admin=True, session_capacity=2 * MAX_ITEMS, spill_bytes=0))
    httpx.get(f"{running.url}/openapi.json").raise_for_status()  # a server of `unroll serve` makes it before
    httpx.post(f"{running.url}/v1/models/lstm/sessions", json={"session_id": "s"}).raise_for_status()
    yield running
    running.stop()


def parsing() -> float:
    """Return the current parsing time of the largest body, in seconds, as it depends on the machine's load."""
    body, began = f'{{"inputs":[{rows()}]}}', thread_time()
    orjson.loads(body)
    return thread_time() - began


@pytest.fixture
def holds_briefly(watched: Running, stopwatch: Stopwatch) -> Callable[[Callable[[], object]], None]:
    def turns(act: Callable[[], object]) -> float:
        """Return the longest turn as a multiple of the parsing time."""
        for stream in watched.server.streams:
            stream._errors = Allowance(1.0, 1e9)  # type: ignore[attr-defined]
        httpx.get(f"{watched.url}/livez").raise_for_status()
        stopwatch.longest = 0.0
        act()
        httpx.get(f"{watched.url}/livez").raise_for_status()  # the turn before this answer has ended
        return stopwatch.longest / parsing()

    def check(act: Callable[[], object]) -> None:
        found: list[float] = []
        while not found or (min(found) >= _TIMES and len(found) < _TRIES):
            found.append(turns(act))
        assert min(found) < _TIMES, f"turns took {found} times as long as it takes to parse the largest body"

    return check


def infer(shape: list[int], data: str, **more: object) -> str:
    head = {"name": "x", "datatype": "FP32", "shape": shape}
    return json.dumps({"inputs": [{**head, "data": "DATA"}], **more}).replace('"DATA"', f"[{data}]")


def rollout(columns: list[dict[str, object]], **more: object) -> str:
    return json.dumps({"steps": 1, "map": {"kind": "columns", "columns": columns}, **more})


def packed(content: bytes) -> tuple[bytes, dict[str, str]]:
    return gzip.compress(content, 1), {**raw_steps(content[::12]), "Content-Encoding": "gzip"}


_SESSION = "/v1/models/lstm/sessions/s"
_MIB = 2**20
#: The largest bodies that each route accepts, or refuses only after reading. Built when sent.
BODIES: dict[str, Callable[[], tuple[str, str | bytes, dict[str, str]]]] = {
    "a sequence in JSON": lambda: ("/v1/models/lstm/sequences", f'{{"inputs":[[{rows()}]]}}', _JSON),
    "strings for numbers": lambda: ("/v1/models/lstm/sequences", f'{{"inputs":[[{_STRINGS}]]}}', _JSON),
    "a raw sequence": lambda: ("/v1/models/lstm/sequences", _X.tobytes(), raw_steps(_X)),
    "raw bytes of no length": lambda: ("/v1/models/lstm/sequences", bytes(16 * _MIB), raw_steps(_X)),
    "a compressed body": lambda: ("/v1/models/lstm/sequences", *packed(bytes(16 * _MIB - 4))),
    "a bomb": lambda: ("/v1/models/lstm/sequences", *packed(bytes(64 * _MIB))),
    "a bomb for the application": lambda: ("/v1/models/lstm/sessions", *packed(bytes(64 * _MIB))),
    "steps in JSON": lambda: (f"{_SESSION}/steps", f'{{"inputs":[{rows()}]}}', _JSON),
    "raw steps": lambda: (f"{_SESSION}/steps", _X.tobytes(), raw_steps(_X)),
    "an inference in JSON": lambda: ("/v2/models/lstm/infer", infer([1, 65_000, 3], rows()), _JSON),
    "many sequences": lambda: ("/v2/models/lstm/infer", infer([1024, 60, 3], rows(1024 * 60)), _JSON),
    "a state": lambda: ("/v1/models/lstm/sessions", f'{{"state":[{"0.5," * 262_000}0]}}', _JSON),
    "static inputs": lambda: ("/v1/models/lstm/sessions", f'{{"static":{{"a":[{"0.5," * 262_000}0]}}}}', _JSON),
    "a snapshot in JSON": lambda: ("/v1/models/lstm/sessions", f'{{"snapshot":"{"A" * 2_000_000}"}}', _JSON),
    "a raw snapshot": lambda: ("/v1/models/lstm/sessions", bytes(16 * _MIB), RAW),
    "unknown members": lambda: (f"{_SESSION}/fork", json.dumps({f"{i}": 0 for i in range(100_000)}), _JSON),
    "a map": lambda: (f"{_SESSION}/rollout", rollout([{"from": 0, "scale": 0.5, "offset": 1.0}] * MAX_ITEMS), _JSON),
    "a map that is too large": lambda: (f"{_SESSION}/rollout", rollout([{"from": 0}] * 100_000), _JSON),
    "a map of nothing": lambda: (f"{_SESSION}/rollout", rollout([{"x": 0}] * 2 * MAX_ITEMS), _JSON),
    "maps of many inputs": lambda: (
        f"{_SESSION}/rollout",
        json.dumps({"steps": 1, "map": {f"{i}": {"kind": "argmax"} for i in range(2 * MAX_ITEMS - 1)}}),
        _JSON,
    ),
    "values to come": lambda: (f"{_SESSION}/rollout", rollout([{"future": [0.5] * 80_000}] * 3), _JSON),
    "an index": lambda: ("/v2/repository/index", f'{{"a":[{"0.5," * 262_000}0]}}', _JSON),
}


@pytest.mark.parametrize("request_of", BODIES.values(), ids=BODIES)
def test_no_body_blocks_the_loop(watched: Running, holds_briefly: Callable, request_of: Callable) -> None:
    path, body, headers = request_of()
    holds_briefly(lambda: httpx.post(watched.url + path, content=body, headers=headers))


def test_concurrent_scrapes_do_not_block_the_loop(watched: Running, holds_briefly: Callable) -> None:
    with ExitStack() as opened:
        wires = [Wire(watched.port) for _ in range(_AT_ONCE)]
        for wire in wires:
            opened.callback(wire.socket.close)

        def scrape() -> None:
            stopped = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), watched.uvicorn.loop)
            for wire in wires:
                wire.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            stopped.result()
            assert {wire.answer()[0] for wire in wires} == {200}

        holds_briefly(scrape)


def control(op: str, **members: object) -> str:
    return json.dumps({"op": op, **members})


def entries(x: np.ndarray, position: int | None = None, *, uneven: bool = False) -> bytes:
    return frame(*[(handle, position, x[: 1 + handle % 2] if uneven else x) for handle in _HANDLES])


_ONE, _TWO, _NAN = _X[:1], _X[:2], np.full((2, 3), np.nan, "<f4")
_IDS = [{"handle": i, "session_id": f"{i:0128}", "mode": "either", "depth": 64} for i in range(MAX_ITEMS)]
#: Whether the frame's handles are bound first, the messages, and the number of entries or messages that answer them.
MESSAGES: dict[str, Callable[[], tuple[bool, list[str | bytes], int]]] = {
    "sessions and their ends": lambda: (
        False,
        [control("open", sessions=_IDS), control("close", handles=[*range(MAX_ITEMS)])],
        2,
    ),
    "sessions that are not there": lambda: (
        False,
        [control("open", sessions=[{"handle": i, "session_id": "?", "mode": "resume"} for i in range(MAX_ITEMS)])],
        1,
    ),
    "handles to detach that are unbound": lambda: (False, [control("detach", handles=[*range(MAX_ITEMS)])], 1),
    "handles to detach": lambda: (True, [control("detach", handles=[*_HANDLES] * 2)], 1),
    "entries of unbound handles": lambda: (False, [entries(_ONE)], MAX_ENTRIES),
    "uneven entries of unbound handles": lambda: (False, [entries(_TWO, uneven=True)], MAX_ENTRIES),
    "entries": lambda: (True, [entries(_ONE)], MAX_ENTRIES),
    "uneven entries": lambda: (True, [entries(_TWO, uneven=True)], MAX_ENTRIES),
    "entries at a wrong position": lambda: (True, [entries(_ONE, 7777)], MAX_ENTRIES),
    "entries that are not finite": lambda: (True, [entries(_NAN)], MAX_ENTRIES),
    "uneven entries that are not finite": lambda: (True, [entries(_NAN, uneven=True)], MAX_ENTRIES),
    "entries of one session": lambda: (True, [frame(*[(1, None, _ONE)] * MAX_ENTRIES)], MAX_ENTRIES),
    "steps in JSON": lambda: (True, [f'{{"op":"steps","handle":0,"inputs":[{rows()}]}}'], 1),
    "a map of nothing": lambda: (True, [rollout([{"x": 0}] * MAX_ITEMS, op="rollout", handle=0)], 1),
}


def answers(socket: ClientConnection, count: int) -> None:
    while count > 0:
        message = socket.recv()
        count -= 1 if isinstance(message, str) else struct.unpack_from("<I", message, 4)[0]


@pytest.mark.parametrize("conversation", MESSAGES.values(), ids=MESSAGES)
def test_no_message_blocks_the_loop(watched: Running, holds_briefly: Callable, conversation: Callable) -> None:
    bound, messages, count = conversation()

    def act() -> None:
        for message in messages:
            socket.send(message)
        answers(socket, count)

    with connect(f"ws://{watched.address}/v1/models/lstm/stream", compression=None, max_size=None) as socket:
        if bound:
            socket.send(control("open", sessions=[{"handle": handle, "depth": 64} for handle in _HANDLES]))
            socket.recv()
        holds_briefly(act)


def test_entries_refused_for_lack_of_room_do_not_block_the_loop(
    watched: Running, holds_briefly: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act() -> None:
        socket.send(entries(_ONE))
        answers(socket, MAX_ENTRIES)

    with connect(f"ws://{watched.address}/v1/models/lstm/stream", compression=None, max_size=None) as socket:
        socket.send(control("open", sessions=[{"handle": handle} for handle in _HANDLES]))
        socket.recv()
        monkeypatch.setattr(watched.model("lstm").scheduler.admission, "_max_queue", 0)
        holds_briefly(act)


def test_lists_of_many_sessions_do_not_block_the_loop(watched: Running, holds_briefly: Callable) -> None:
    with connect(f"ws://{watched.address}/v1/models/lstm/stream", compression=None, max_size=None) as socket:
        for begin in (0, MAX_ITEMS):
            socket.send(control("open", sessions=[{"handle": begin + i} for i in range(MAX_ITEMS)]))
            socket.recv()
        for query in ("limit=1000", "limit=1000&min_idle=1000"):
            holds_briefly(lambda query=query: httpx.get(f"{watched.url}/v1/admin/sessions?{query}").raise_for_status())
