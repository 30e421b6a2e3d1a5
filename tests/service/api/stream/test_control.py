"""Control messages: invalid ones, slow ones, and the messages queued behind them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_link import Wire
from serving import Oracle, Running, Serve
from streams import Dial, Plain, frame
from waiting import PATIENCE, reached, turns
from websockets.exceptions import ConnectionClosed

from unroll.service.api.bodies import MAX_ITEMS
from unroll.service.api.stream.control import SLICE
from unroll.service.settings import Settings

Oracles = Callable[..., Oracle]


def test_closing_while_a_chunk_runs(dial: Dial, server: Running, oracle: Oracles, x: np.ndarray):
    """Running work completes and is answered; waiting work fails."""
    client = dial()
    client.bind(0, depth=2)
    with server.holding("lstm") as held:
        client.socket.send(frame((0, 0, x[:2])))
        held.wait()
        client.socket.send(frame((0, 2, x[2:4])))
        client.socket.send(json.dumps({"op": "close", "handles": [0]}))
        messages = [json.loads(client.socket.recv(PATIENCE)) for _ in range(2)]
    codes = {message["op"]: message.get("code") for message in messages}
    assert codes == {"error": "session_closed", "closed": None}
    (reply,), _ = client.receive(1)
    assert np.array_equal(reply.outputs[0], oracle("lstm")(x[:2]))


@pytest.mark.parametrize(
    ("message", "handle"),
    [
        ("", None),
        ("{", None),
        ("[]", None),
        ("null", None),
        ("{}", None),
        ('{"op": "reset"}', None),
        ('{"op": 7}', None),
        ('{"op": "open"}', None),
        ('{"op": "open", "sessions": []}', None),
        ('{"op": "open", "sessions": {}}', None),
        ('{"op": "open", "sessions": [7]}', None),
        ('{"op": "open", "sessions": [{}]}', None),
        ('{"op": "open", "sessions": [{"handle": -1}]}', None),
        ('{"op": "open", "sessions": [{"handle": 4294967296}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1.0}]}', None),
        ('{"op": "open", "sessions": [{"handle": true}]}', None),
        ('{"op": "open", "sessions": [{"handle": "1"}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1e999}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1, "depth": 0}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1, "depth": 65}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1, "mode": "old"}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1, "session_id": 5}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1, "position": 5}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1}], "more": 1}', None),
        ('{"op": "open", "sessions": [{"handle": 1, "session_id": "\\ud800"}]}', None),
        ('{"op": "close", "handles": []}', None),
        ('{"op": "close", "handles": [null]}', None),
        ('{"op": "detach", "handles": [77]}', 77),
        ('{"op": "close", "handles": ' + "[" * 100_000 + "]" * 100_000 + "}", None),
    ],
)
def test_invalid_control_messages(dial: Dial, message: str, handle: int | None):
    client = dial()
    client.socket.send(message)
    _, (error,) = client.receive(1)
    assert error["code"] == "malformed_request"
    assert error.get("handle") == handle
    client.bind(1)  # nothing changed, and the connection still works


@pytest.mark.parametrize("count", [MAX_ITEMS + 1, 3 * MAX_ITEMS])
def test_a_message_that_opens_too_many_sessions_opens_none(dial: Dial, count: int):
    client = dial()
    client.socket.send(json.dumps({"op": "open", "sessions": [{"handle": handle} for handle in range(count)]}))
    _, (error,) = client.receive(1)
    assert error["code"] == "malformed_request"
    assert str(MAX_ITEMS) in error["detail"]
    client.bind(1)


def test_messages_above_the_limits(serve: Serve, dial: Dial, x: np.ndarray):
    running = serve(max_json_bytes=200, max_body_bytes=1000)
    client = dial(running=running)
    client.socket.send(" " * 201)
    _, (error,) = client.receive(1)
    assert error["code"] == "body_too_large"
    client.bind(0)
    client.socket.send(bytes(1001))
    with pytest.raises(ConnectionClosed) as closed:
        client.receive(1)
    assert closed.value.rcvd
    assert closed.value.rcvd.code == 1009


def test_a_frame_above_the_limit_that_the_transport_accepted(repository: Path, dial: Dial):
    running = Plain(Settings(repository=repository, max_body_bytes=1000))
    try:
        client = dial(running=running)
        client.socket.send(bytes(1001))
        _, (error,) = client.receive(1)
        assert error["code"] == "body_too_large"
    finally:
        running.stop()


async def test_a_long_request_runs_in_slices_and_later_messages_wait(wire: Wire):
    """The rest runs on later turns of the event loop; later messages wait in order."""
    names = [f"many-{number}" for number in range(3 * SLICE)]
    wanted = [{"handle": handle, "session_id": name} for handle, name in enumerate(names)]
    wire.connection.on_text(json.dumps({"op": "open", "sessions": wanted}).encode())
    wire.connection.on_text(json.dumps({"op": "close", "handles": [*range(1, 3 * SLICE)]}).encode())
    wire.frame(range(2))
    wire.connection.on_text(b'{"op": "detach", "handles": [0]}')
    assert (wire.flow, wire.sent) == (["pause"], [])
    assert f"{SLICE} sessions" in repr(wire.connection)
    await reached(lambda: len(wire.sent) == 4)
    opened, closed, refused, detached = wire.sent
    assert [item["session_id"] for item in opened["sessions"]] == names
    assert closed["sessions"] == [{"handle": handle, "position": 0} for handle in range(1, 3 * SLICE)]
    assert (refused["handle"], refused["code"], detached["op"]) == (1, "malformed_request", "detached")
    assert wire.flow[-1] == "resume"
    wire.engine.release()
    await reached(wire.answered)


async def test_thousands_of_messages_in_the_backlog(wire: Wire):
    wanted = [{"handle": handle} for handle in range(SLICE)]
    wire.connection.on_text(json.dumps({"op": "open", "sessions": wanted}).encode())
    for _ in range(1500):
        wire.connection.on_text(b'{"op": "close", "handles": [7]}')
    await reached(lambda: len(wire.sent) == 1501)
    assert [message["op"] for message in wire.sent[:2]] == ["opened", "closed"]
    assert wire.flow == ["pause", "resume"]


async def test_a_connection_lost_while_sessions_are_opened(wire: Wire):
    wanted = [{"handle": handle} for handle in range(3 * SLICE)]
    wire.connection.on_text(json.dumps({"op": "open", "sessions": wanted}).encode())
    wire.connection.close()
    await turns(5)
    assert (wire.flow, wire.sent) == ([], [])
    assert f"{SLICE} sessions" in repr(wire.connection)
