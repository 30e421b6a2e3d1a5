"""Unusual but legal HTTP: the fast path and FastAPI give the same answers."""

import asyncio
import itertools
import json
import math
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from raw_http import STEP, UPGRADE, Answer, Wire, request
from serving import RAW, Running
from waiting import until

from unroll.service.core.turns import LONG_BYTES
from unroll.service.protocol import open_inference
from unroll.service.protocol.tensors import Codec

_ids = itertools.count()


@pytest.fixture
def path(client: httpx.Client) -> str:
    """Open a session; return the path of its steps."""
    session_id = f"wire-{next(_ids)}"
    client.post("/v1/models/lstm/sessions", json={"session_id": session_id}).raise_for_status()
    return f"/v1/models/lstm/sessions/{session_id}/steps"


def reached(answer: Answer) -> int:
    status, headers, _ = answer
    assert status == 200, answer
    return int(headers["unroll-position"])


def test_byte_after_byte(wire: Wire, path: str) -> None:
    wire.send(*(bytes([byte]) for byte in request(path)))
    assert reached(wire.answer()) == 1


def test_a_chunked_body(wire: Wire, path: str) -> None:
    content = np.tile(STEP, (3, 1)).tobytes()
    parts = b"".join(b"%x\r\n%b\r\n" % (12, content[i : i + 12]) for i in range(0, 36, 12))
    wire.send(request(path, parts + b"0\r\n\r\n", "Transfer-Encoding: chunked", steps=3))
    assert reached(wire.answer()) == 3


def test_requests_that_do_not_wait_for_answers_are_answered_in_order(
    wire: Wire, path: str, client: httpx.Client
) -> None:
    """The first request takes the fast path, the rest go through FastAPI; answers must keep their order."""
    get = f"GET {path.removesuffix('/steps')} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    wire.send(request(path) + request(path) + get + request(path))
    assert reached(wire.answer()) == 1
    assert reached(wire.answer()) == 2
    assert b'"position":2' in wire.answer()[2]
    assert reached(wire.answer()) == 3


def test_expect_continue(wire: Wire, path: str) -> None:
    head, _, body = request(path, STEP.tobytes(), "Expect: 100-continue").partition(b"\r\n\r\n")
    wire.send(head + b"\r\n\r\n")
    assert wire.socket.recv(65536).startswith(b"HTTP/1.1 100 ")
    wire.send(body)
    assert reached(wire.answer()) == 1


@pytest.mark.parametrize("how", [{"version": "1.0"}, {"connection": "close"}])
def test_a_connection_that_is_to_be_closed(wire: Wire, path: str, how: dict[str, str]) -> None:
    headers = ["Connection: close"] if "connection" in how else []
    wire.send(request(path, STEP.tobytes(), *headers, version=how.get("version", "1.1")))
    answer = wire.answer()
    assert reached(answer) == 1
    assert answer[1]["connection"] == "close"
    assert wire.closed()


def test_an_escaped_path_and_a_query(wire: Wire, path: str) -> None:
    wire.send(request(path.replace("wire-", "%77ire%2D") + "?a=b"))
    assert reached(wire.answer()) == 1


def test_a_body_that_is_too_large_is_refused_before_it_is_read(serve: Callable[..., Running]) -> None:
    running = serve(max_body_bytes=100)
    for headers in ([], ["Transfer-Encoding: chunked"]):
        wire = Wire(running.port)
        body = b"65\r\n" + bytes(101) + b"\r\n" if headers else bytes(101)
        wire.send(request("/v1/models/lstm/sequences", body, *headers))
        status, _, content = wire.answer()
        assert (status, b"body_too_large" in content) == (413, True)
        if headers:
            wire.send(b"0\r\n\r\n")
        wire.send(request("/v1/models/lstm/sequences"))  # the connection stays open
        assert wire.answer()[0] == 200
        wire.socket.close()


def test_headers_that_must_not_repeat(wire: Wire, path: str) -> None:
    wire.send(request(path, STEP.tobytes(), "Unroll-Position: 0", "Unroll-Position: 1"))
    status, _, content = wire.answer()
    assert (status, b"malformed_request" in content) == (400, True)
    wire.send(request(path))
    assert reached(wire.answer()) == 1


def test_other_methods_get_405(client: httpx.Client, path: str) -> None:
    assert client.put(path, content=STEP.tobytes(), headers=RAW).status_code == 405


@contextmanager
def _left_while_it_waits(running: Running, path: str, behind: int) -> Iterator[None]:
    """Send a step and disconnect while `behind` steps of other sessions are being committed."""
    with running.holding("lstm") as held:
        blocker = Wire(running.port)
        blocker.send(request("/v1/models/lstm/sequences"))
        held.wait()
        leaving = Wire(running.port)
        leaving.send(request(path))
        scheduler = running.model("lstm").scheduler
        until(lambda: scheduler.in_flight == behind + 1)
        leaving.socket.close()
        yield
    blocker.socket.close()


def test_small_step_of_a_disconnected_client_is_not_applied(serve: Callable[..., Running]) -> None:
    running = serve()
    scheduler = running.model("lstm").scheduler
    with httpx.Client(base_url=running.url) as client:
        client.post("/v1/models/lstm/sessions", json={"session_id": "a"}).raise_for_status()
        with _left_while_it_waits(running, "/v1/models/lstm/sessions/a/steps", 1):
            until(lambda: scheduler.in_flight == 1)
        until(lambda: scheduler.in_flight == 0)
        assert client.get("/v1/models/lstm/sessions/a").json()["position"] == 0
        assert scheduler.counters.failed == {"cancelled": 1}


def test_an_idle_connection_is_closed_in_time(serve: Callable[..., Running]) -> None:
    running = serve()
    running.uvicorn.config.timeout_keep_alive = 0  # on the next turn of the loop
    wire = Wire(running.port)
    wire.send(request("/v1/models/lstm/sequences"))
    assert wire.answer()[0] == 200
    assert wire.closed()
    wire.socket.close()


def test_disconnect_with_a_pipelined_request_cancels_the_running_one(
    server: Running, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is written to a lost connection, which would log an error."""
    rollout = {"steps": 1, "map": {"kind": "columns", "columns": [{"constant": 0.5}] * 3}, "inputs": STEP.tolist()}
    body = json.dumps(rollout)
    head = f"POST {path.removesuffix('steps')}rollout HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    wire, tasks = Wire(server.port), server.uvicorn.server_state.tasks
    with server.holding("lstm") as engine:
        wire.send(
            f"{head}Content-Length: {len(body)}\r\n\r\n{body}GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        )
        engine.wait()
        address = wire.socket.getsockname()
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wire.socket.close()
        until(lambda: all(c.client != address for c in [*server.uvicorn.server_state.connections]), "the reset")
    until(lambda: not tasks, "the end of the request")
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


def test_long_bodies_are_parsed_and_read_in_separate_turns(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn of the event loop does at most one part of this work, however many bodies arrive at once."""
    monkeypatch.setattr("unroll.service.core.turns._LONG_SECONDS", math.inf)  # a timer would run before `count`
    ran_in: list[tuple[str, int]] = []
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def watch(owner: object, name: str) -> None:
        run = getattr(owner, name)

        def watched(*arguments: object) -> object:
            if name != "loads" or len(arguments[0]) > LONG_BYTES:  # type: ignore[arg-type]
                ran_in.append((name, turns))
            return run(*arguments)

        monkeypatch.setattr(owner, name, watched)

    watch(orjson, "loads")
    watch(Codec, "sequences_from_json")
    watch(open_inference, "read_inputs")
    rows = np.ones((8000, 3)).tolist()
    bodies = {
        "/v1/models/lstm/sequences": {"inputs": [rows]},
        "/v2/models/lstm/infer": {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 8000, 3], "data": [rows]}]},
    }
    counting = asyncio.run_coroutine_threadsafe(count(), server.uvicorn.loop)
    with ExitStack() as opened:
        opened.callback(counting.cancel)
        wires = [(Wire(server.port), path) for path in bodies for _ in range(3)]
        for wire, path in wires:
            opened.callback(wire.socket.close)
            head, _, body = request(path, json.dumps(bodies[path]).encode()).partition(b"\r\n\r\n")
            wire.send(head.replace(b"octet-stream", b"json") + b"\r\n\r\n" + body)
        assert [wire.answer()[0] for wire, _ in wires] == [200] * 6
        opening = request("/v1/models/lstm/sessions", json.dumps({"state": [0.5] * LONG_BYTES}).encode())
        wires[0][0].send(opening.replace(b"octet-stream", b"json"))
        assert wires[0][0].answer()[0] == 422, "it has too many values, and its text was parsed by pydantic alone"
    assert sorted(name for name, _ in ran_in) == ["loads"] * 6 + ["read_inputs"] * 3 + ["sequences_from_json"] * 3
    assert len({turn for _, turn in ran_in}) == 12, ran_in
    assert [name == "loads" for name, _ in ran_in] == [True, False] * 6, "there is one document at a time"


_LONG = 2_000_000
#: The most that asyncio and uvloop read at once.
_SEGMENT = 2**18


@pytest.mark.parametrize("kind", ["requests", "messages"])
def test_one_turn_reads_one_segment_of_a_connection(server: Running, wire: Wire, kind: str) -> None:
    """uvloop alone would read up to 32 segments of each connection before anything else runs."""
    sizes, loop = [0], server.uvicorn.loop

    def look() -> None:
        sizes.append(server.server.held.by_kind[kind])
        if sizes[-1] < _LONG:
            loop.call_soon(look)

    begun = request("/v1/models/lstm/sequences", bytes(2 * _LONG))[: -2 * _LONG]
    if kind == "messages":
        begun = b"\x82\xff" + (2 * _LONG).to_bytes(8) + bytes(4)
        wire.send(UPGRADE)
        assert wire.head()[0] == 101
    with server.in_one_turn():
        wire.send(begun, bytes(_LONG))
        loop.call_soon_threadsafe(look)
    until(lambda: sizes[-1] >= _LONG, "the arrival of the body")
    assert max(after - before for before, after in itertools.pairwise(sizes)) <= _SEGMENT


def _tiny_chunks(body: bytes) -> bytes:
    return b"".join(b"2\r\n%b\r\n" % body[i : i + 2] for i in range(0, len(body), 2)) + b"0\r\n\r\n"


def test_pipelined_requests_of_one_segment_keep_their_order(server: Running, wire: Wire, path: str) -> None:
    """A chunked body takes many turns, and an offer of another protocol is parsed twice."""
    x = np.random.default_rng(1).standard_normal((4000, 3)).astype("<f4")
    chunked = request(path, _tiny_chunks(x.tobytes()), "Transfer-Encoding: chunked", steps=len(x))
    offer = request(path, STEP.tobytes(), "Upgrade: h2c", "Connection: Upgrade")
    with server.in_one_turn():
        threading.Thread(target=wire.send, args=((chunked + offer + request(path) * 200) * 2,)).start()
    reaches = [4000, *range(4001, 4202), 8201, *range(8202, 8403)]
    assert [reached(wire.answer()) for _ in reaches] == reaches


@contextmanager
def _watched(server: Running, wire: Wire, measure: Callable[[Any], int]) -> Iterator[list[int]]:
    """Measure the wire's connection in each turn of the event loop."""
    wire.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert wire.answer()[0] == 200
    connection, sizes, ends = server.connection_of(wire.socket), list[int](), threading.Event()

    def look() -> None:
        sizes.append(measure(connection))
        if not ends.is_set():
            server.uvicorn.loop.call_soon(look)

    server.uvicorn.loop.call_soon_threadsafe(look)
    yield sizes
    ends.set()


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_segment_of_many_requests_is_parsed_in_many_turns(server: Running, wire: Wire, method: str) -> None:
    count = 3000
    sent = f"{method} /v1/models/lstm/sessions/none HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * count
    with _watched(server, wire, lambda connection: len(connection.pipeline)) as waiting:
        threading.Thread(target=wire.send, args=(sent,)).start()
        assert {wire.answer()[0] for _ in range(count)} == {404}
    assert max(waiting) < count // 5


def test_an_answer_amid_a_segment_does_not_let_the_next_segment_in(server: Running, wire: Wire) -> None:
    count = 60
    body = _tiny_chunks(bytes(10_000))
    sent = request("/v1/models/none/sequences", body, "Transfer-Encoding: chunked") * count
    with _watched(server, wire, lambda connection: len(connection._rest)) as sizes:
        threading.Thread(target=wire.send, args=(sent,)).start()
        assert {wire.answer()[0] for _ in range(count)} == {404}
    assert max(sizes) <= _SEGMENT
