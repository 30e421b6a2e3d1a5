"""Messages that cost a client nothing are limited per connection and interleaved with other clients' messages."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from client_frames import BINARY, CONTINUATION, PING, PONG, TEXT, masked
from raw_http import Wire, request
from serving import Running
from streams import Dial, frame
from test_framing import RawStream
from waiting import PATIENCE, until

from unroll.service.api.app_state import AppState
from unroll.service.api.stream.allowance import CONTROLS, ENTRIES_PER_ERROR, MAX_FRAGMENTS, PINGS, Allowance
from unroll.service.api.stream.control import SLICE

_FEW = 1.0, 4


@pytest.fixture
def stream(server: Running, oracle: Any) -> Iterator[RawStream]:
    stream = RawStream(server, oracle("lstm"))
    yield stream
    stream.close()


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (masked(PING, b""), "pings"),
        (masked(PONG, b"x"), "pings"),
        (masked(TEXT, b"x"), "malformed"),
        (masked(BINARY, b"x"), "malformed"),
        (masked(BINARY, b""), "malformed"),
        (masked(TEXT, b'{"op": "detach", "handles": [7]}') * ENTRIES_PER_ERROR, "malformed"),
        (masked(BINARY, frame((7, None, np.zeros((1, 3), "<f4")))) * ENTRIES_PER_ERROR, "malformed"),
    ],
    ids=["pings", "pongs", "text", "frames", "empty frames", "handles", "entries"],
)
def test_a_flood_ends_the_connection_with_the_limit_as_the_reason(
    server: Running, stream: RawStream, message: bytes, why: str
) -> None:
    (connection,) = server.server.streams
    connection._errors = Allowance(*_FEW)  # type: ignore[attr-defined]  # answers that fit in the socket's buffers
    stream.send(message * (2 * int(PINGS[1]) if why == "pings" else 20))
    code, reason = stream.ending()
    assert (code, why in reason, "per second" in reason) == (1008, True, True)


def test_message_in_too_many_fragments_is_refused(stream: RawStream) -> None:
    stream.send(masked(BINARY & 0x7F, b"") + masked(CONTINUATION & 0x7F, b"") * (MAX_FRAGMENTS + 1))
    code, reason = stream.ending()
    assert (code, str(MAX_FRAGMENTS) in reason) == (1008, True)


def test_other_connections_are_answered_during_a_flood(
    server: Running, stream: RawStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server finds a flood and a step at the same time, and answers the step before the flood ends."""
    number = 400
    pairs = b"".join(
        masked(TEXT, json.dumps({"op": "open", "sessions": [{"handle": handle}]}).encode())
        + masked(TEXT, json.dumps({"op": "close", "handles": [handle]}).encode())
        for handle in range(1, number + 1)
    )
    calm = Wire(server.port)
    calm.send(b"POST /v1/models/lstm/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
    session = json.loads(calm.answer()[2])["session_id"]
    counters = server.model("lstm").scheduler.counters
    before, opened, count = counters.opened, [], AppState.count

    def counted(self: AppState, *of: Any) -> None:
        opened.append(counters.opened - before)
        count(self, *of)

    monkeypatch.setattr(AppState, "count", counted)
    sent = threading.Event()
    server.uvicorn.loop.call_soon_threadsafe(sent.wait, PATIENCE)
    stream.send(pairs)
    calm.send(request(f"/v1/models/lstm/sessions/{session}/steps"))
    sent.set()
    assert calm.answer()[0] == 200
    assert opened < [number]
    calm.socket.close()


def test_a_client_of_thousands_of_sessions_is_not_limited(server: Running, dial: Dial, x: np.ndarray) -> None:
    """No limit applies to the sessions in a message, the entries in a frame, or pipelined frames."""
    client = dial()
    number = 16 * SLICE
    client.bind(*range(number), depth=2)
    chunk = frame(*[(handle, None, x[:1]) for handle in range(number)])
    for _ in range(2):
        client.socket.send(chunk)
    good, bad = client.receive(2 * number)
    assert not bad
    assert len(good) == 2 * number
    uneven = frame(*[(handle, None, x[: 1 + handle % 2]) for handle in range(number)])
    client.socket.send(uneven)
    good, bad = client.receive(number)
    assert not bad
    assert [reply.steps for reply in sorted(good, key=lambda reply: reply.handle)] == [1, 2] * (number // 2)
    closed = client.control("close", handles=[*range(number)])
    assert [item["position"] for item in closed["sessions"]] == [3, 4] * (number // 2)


def test_control_messages_beyond_their_rate_wait(
    server: Running, stream: RawStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are answered, but the server pauses reading in between."""
    (connection,) = server.server.streams
    connection._control._allowance = Allowance(CONTROLS[0], _FEW[1])  # type: ignore[attr-defined]
    stream.send(masked(TEXT, b'{"op": "stop", "handle": 0}') * 50)
    until(lambda: "paused by rate" in repr(connection), "the end of the allowance")
    assert [json.loads(stream.message()[1])["op"] for _ in range(50)] == ["stopped"] * 50
