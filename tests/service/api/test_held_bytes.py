"""The account of bytes held by requests and answers: limited in total and per tenant, and zero at the end."""

import gzip
import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from raw_http import STEP, UPGRADE, Wire, request
from serving import Running, metric
from waiting import until

from unroll.service.access.held_bytes import KINDS, SMALL, HeldBytes, Holding
from unroll.service.access.keys import Quota
from unroll.service.core.errors import QueueFull, QuotaExceeded
from unroll.service.settings import Settings

LIMIT = 600_000
_HALF = LIMIT // 2 - SMALL
_ROUTES = {
    "steps": "/v1/models/lstm/sessions/held/steps",
    "sequences": "/v1/models/lstm/sequences",
    "v2": "/v2/models/lstm/infer",
    "a route of FastAPI": "/v1/models/lstm/sessions",
}


@pytest.fixture(scope="module")
def small(few: Path) -> Iterator[Running]:
    running = Running(Settings(repository=few, max_held_bytes=LIMIT))
    httpx.post(f"{running.url}/v1/models/lstm/sessions", json={"session_id": "held"}).raise_for_status()
    yield running
    running.stop()
    assert not any(running.server.held.by_kind.values())


@pytest.fixture
def dial(small: Running) -> Iterator[Callable[[], Wire]]:
    wires: list[Wire] = []

    def call() -> Wire:
        wires.append(Wire(small.port))
        return wires[-1]

    yield call
    for wire in wires:
        wire.socket.close()
    until(lambda: not any(small.server.held.by_kind.values()), "the end of what was held")


def held(running: Running, kind: str) -> int:
    return running.server.held.by_kind[kind]


def head(path: str, size: int) -> bytes:
    lines = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
    return f"{lines}Content-Length: {size}\r\n\r\n".encode()


@pytest.mark.parametrize("path", _ROUTES.values(), ids=_ROUTES)
def test_half_sent_bodies_count(small: Running, dial: Callable[[], Wire], path: str) -> None:
    """Received bytes count, not announced ones. At the limit, large bodies are refused and small ones are accepted."""
    senders = [dial() for _ in range(2)]
    for sender in senders:
        sender.send(head(path, 10_000_000), bytes(_HALF))
    until(lambda: held(small, "requests") == 2 * _HALF, "the arrival of the bodies")
    assert metric(httpx.get(f"{small.url}/metrics").text, "unroll_held_bytes", kind="requests") == 2 * _HALF
    one_more = dial()
    one_more.send(head(path, 10_000_000), bytes(5 * SMALL))
    status, headers, body = one_more.answer()
    assert (status, headers["retry-after"], json.loads(body)["code"]) == (503, "1", "queue_full")
    assert "--max-held-bytes" in body.decode()
    calm = dial()
    calm.send(request(_ROUTES["steps"]))
    assert calm.answer()[0] == 200
    for sender in senders:
        sender.socket.close()
    until(lambda: held(small, "requests") == 0, "the end of the bodies")
    calm.send(request(_ROUTES["sequences"], bytes(10_000 * STEP.nbytes), steps=10_000))
    assert calm.answer()[0] == 200


def test_a_body_that_does_not_fit_once_it_is_decompressed_is_refused_before_the_next_request(
    dial: Callable[[], Wire],
) -> None:
    wire, body = dial(), gzip.compress(bytes(2 * LIMIT))
    wire.send(
        request(_ROUTES["sequences"], body, "Content-Encoding: gzip") + b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    )
    assert wire.answer()[0] == 503
    assert wire.answer()[0] < 500


def test_messages_of_streams_that_are_half_sent(small: Running, dial: Callable[[], Wire]) -> None:
    frame = b"\x82\xff" + (10_000_000).to_bytes(8) + bytes(4)
    streams = [dial() for _ in range(3)]
    for stream in streams:
        stream.send(UPGRADE)
        assert stream.head()[0] == 101
    for stream in streams[:2]:
        stream.send(frame + bytes(_HALF))
    until(lambda: held(small, "messages") > 2 * _HALF, "the arrival of the messages")
    fragments = (b"\x02\xfe" + (60_000).to_bytes(2) + bytes(60_004)) + (
        b"\x00\xfe" + (60_000).to_bytes(2) + bytes(60_004)
    )
    streams[2].send(fragments)
    first, size = streams[2].exactly(2)
    reason = streams[2].exactly(size)
    assert (first, int.from_bytes(reason[:2])) == (0x88, 1013)
    assert b"try again" in reason or b"--max-held-bytes" in reason


def unread(running: Running, dial: Callable[[], Wire]) -> Wire:
    """A used connection with a client that has stopped reading."""
    wire = dial()
    wire.send(request(_ROUTES["steps"]))
    assert wire.answer()[0] == 200
    running.keep_little_for(wire.socket)
    return wire


def test_answers_that_are_not_read(small: Running, dial: Callable[[], Wire]) -> None:
    steps = 40_000
    unread(small, dial).send(request(_ROUTES["sequences"], bytes(steps * STEP.nbytes), steps=steps))
    until(lambda: held(small, "answers") > 0, "an answer that is not read")


def test_events_of_a_rollout_that_are_not_read(small: Running, dial: Callable[[], Wire]) -> None:
    wire = unread(small, dial)
    columns = [{"from": 0}, {"from": 1}, {"constant": 0.5}]
    body = json.dumps({"steps": 4096, "map": {"kind": "columns", "columns": columns}, "inputs": [[0.1, 0.2, 0.3]]})
    fields = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    wire.send(f"POST /v1/models/lstm/sessions/held/rollout HTTP/1.1\r\n{fields}{body}".encode())
    until(lambda: held(small, "events") + held(small, "answers") > 0, "events that are not read")


@pytest.mark.parametrize(
    ("end", "status"),
    [("ok", 200), ("malformed", 400), ("too large", 413), ("disconnect", None), ("short of time", None)],
)
def test_account_returns_to_zero(small: Running, dial: Callable[[], Wire], end: str, status: int | None) -> None:
    """The fixture waits for an account of zero."""
    steps = 8000
    body = bytes(steps * STEP.nbytes)
    wire = dial()
    if end == "disconnect":
        wire.send(head(_ROUTES["sequences"], len(body)), body[: len(body) // 2])
        until(lambda: held(small, "requests") == len(body) // 2, "the arrival of half of the body")
        return
    if end == "short of time":
        with small.holding("lstm") as engine:
            wire.send(request(_ROUTES["sequences"]))
            engine.wait()
            other = dial()
            other.send(request(_ROUTES["sequences"], body, "Unroll-Timeout-Ms: 1", steps=steps))
        assert other.answer()[0] in (200, 503, 504)  # in time, refused, or too late
        return
    if end == "malformed":
        steps += 1
    if end == "too large":
        wire.send(head(_ROUTES["sequences"], 20_000_000))
    else:
        wire.send(request(_ROUTES["sequences"], body, steps=steps))
    assert wire.answer()[0] in (status, 422)


def test_a_server_that_stops_under_half_a_body(few: Path) -> None:
    running = Running(Settings(repository=few, drain_timeout=0.05))
    wire = Wire(running.port)
    wire.send(head(_ROUTES["sequences"], 10_000_000), bytes(_HALF))
    until(lambda: held(running, "requests") == _HALF, "the arrival of the body")
    running.stop()
    assert dict.fromkeys(KINDS, 0) == running.server.held.by_kind
    wire.socket.close()


def test_a_body_in_tiny_chunks_costs_a_small_multiple_of_its_bytes(small: Running, dial: Callable[[], Wire]) -> None:
    size = 100_000
    wire = dial()
    wire.send(
        f"POST {_ROUTES['sequences']} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        "Transfer-Encoding: chunked\r\n\r\n".encode()
    )
    chunks = b"2\r\nxx\r\n" * (size // 2)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        threading.Thread(target=wire.send, args=(chunks,)).start()
        until(lambda: held(small, "requests") == size, "the arrival of the body")
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 8 * size


def test_a_tenant_has_a_quota_of_bytes() -> None:
    account = HeldBytes(1000, lambda tenant: Quota(bytes=300) if tenant == "acme" else None)
    of_acme, of_others = Holding(account, "requests"), Holding(account, "answers")
    assert of_acme.grow(300, "acme") is None
    assert isinstance(of_acme.grow(301), QuotaExceeded)
    assert of_others.grow(700, "other") is None
    assert isinstance(of_others.grow(701), QueueFull)
    of_others.resize(900)
    assert account.by_kind["answers"] == 900
    of_acme.resize(0)
    of_others.resize(0)
    assert not any(account.by_kind.values())
    assert not account.of_tenants
