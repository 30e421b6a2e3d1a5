"""Broken connections, and messages of arbitrary bytes."""

import json
import struct
from collections.abc import Callable

import numpy as np
from fake_link import Wire
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Oracle, Running
from streams import Dial, frame, replies
from waiting import PATIENCE, reached, until

Oracles = Callable[..., Oracle]


UNBOUND = 2**32 - 1  # a handle no test binds


def test_lost_replies_are_sent_again_after_a_reconnect(any_server: Running, dial: Dial, oracle: Oracles, x: np.ndarray):
    """Four chunks are applied, their answers remain unread, and the connection breaks."""
    first = dial(running=any_server)
    (name,) = first.bind(0, depth=4)
    for at in range(0, 8, 2):
        first.socket.send(frame((0, at, x[at : at + 2])))
    session = any_server.model("lstm").scheduler.sessions.find_detached(name, 0.0)
    until(lambda: session.position == 8)
    first.abort()
    client = dial(running=any_server)
    (resumed,) = client.open({"handle": 5, "session_id": name, "mode": "resume", "depth": 4})
    assert resumed["position"] == 8
    for at in range(0, 12, 2):
        client.socket.send(frame((5, at, x[at : at + 2])))
    good, _ = client.receive(6)
    assert [reply.position for reply in good] == [2, 4, 6, 8, 10, 12]
    assert np.array_equal(np.concatenate([reply.outputs[0] for reply in good]), oracle("lstm")(x))


def test_pending_chunks_are_cancelled_with_their_connection(
    any_server: Running, dial: Dial, oracle: Oracles, x: np.ndarray
):
    """One was running and two waited; after a retry, each is applied once."""
    first = dial(running=any_server)
    (name,) = first.bind(0, depth=3)
    (stream,) = any_server.server.streams
    with any_server.holding("lstm") as held:
        for at in range(0, 6, 2):
            first.socket.send(frame((0, at, x[at : at + 2])))
        held.wait()
        until(lambda: "3 entries" in repr(stream))
        first.abort()
        until(lambda: not any_server.server.streams)
        assert any_server.model("lstm").scheduler.in_flight == 1
        client = dial(running=any_server)
        (resumed,) = client.open({"handle": 0, "session_id": name, "mode": "resume", "depth": 3})
        assert resumed["position"] == 0
        for at in range(0, 6, 2):
            client.socket.send(frame((0, at, x[at : at + 2])))
    good, bad = client.receive(3)
    assert not bad
    assert np.array_equal(np.concatenate([reply.outputs[0] for reply in good]), oracle("lstm")(x[:6]))


def test_resuming_while_the_lost_frame_runs(any_server: Running, dial: Dial, oracle: Oracles, rng: np.random.Generator):
    """Sessions are resumed before the batch is committed, and the batch answers the retries."""
    first = dial(running=any_server)
    names = first.bind(*range(30))
    x = rng.standard_normal((30, 1, 3)).astype("<f4")
    with any_server.holding("lstm") as held:
        first.socket.send(frame(*[(handle, 0, x[handle]) for handle in range(30)]))
        held.wait()
        first.abort()
        until(lambda: not any_server.server.streams)
        client = dial(running=any_server)
        client.open(*[{"handle": i, "session_id": name, "mode": "resume"} for i, name in enumerate(names)])
        client.socket.send(frame(*[(handle, 0, x[handle]) for handle in range(30)]))
    good, bad = client.receive(30)
    assert not bad
    for reply in good:
        assert reply.position == 1
        assert np.array_equal(reply.outputs[0], oracle("lstm")(x[reply.handle]))


async def test_nothing_is_sent_after_the_connection_is_lost(wire: Wire):
    await wire.bind(4, depth=2)
    wire.frame(range(4))
    wire.frame(range(2))
    wire.frame(range(3, 4), steps=200)
    (model,) = wire.server.models
    await reached(lambda: wire.engine.reached.is_set())
    assert model.scheduler.in_flight == 7
    wire.connection.close()
    assert model.scheduler.in_flight == 4  # running work completes; waiting work is dropped
    wire.engine.release()
    await reached(lambda: not model.scheduler.in_flight)
    assert wire.sent == []
    assert sum(session.position for session in model.scheduler.sessions) == 4


#: A frame for handles 1 and 2 of a model with three features, and possible damage in transit.
_SOUND = frame((1, 0, np.ones((2, 3), "<f4")), (2, None, np.ones((1, 3), "<f4")))


_DAMAGED = st.one_of(
    st.binary(max_size=100),
    st.integers(0, len(_SOUND)).map(lambda end: _SOUND[:end]),
    st.binary(min_size=1, max_size=40).map(lambda more: _SOUND + more),
    st.tuples(st.integers(0, 39), st.binary(min_size=1, max_size=8)).map(
        lambda cut: _SOUND[: cut[0]] + cut[1] + _SOUND[cut[0] + len(cut[1]) :]
    ),
    st.integers(0, 2**32 - 1).map(lambda number: _SOUND[:4] + struct.pack("<I", number) + _SOUND[8:]),
)


def test_any_frame_is_answered(any_server: Running, dial: Dial):
    """Outputs or errors answer it; the connection and the server keep working."""
    client = dial(running=any_server)
    client.bind(1, 2)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(_DAMAGED)
    def send(content: bytes) -> None:
        client.socket.send(content)
        client.socket.send(json.dumps({"op": "detach", "handles": [UNBOUND]}))
        while True:
            message = client.socket.recv(PATIENCE)
            if isinstance(message, bytes):
                replies(client.manifest, message)
                continue
            error = json.loads(message)
            if error.get("handle") == UNBOUND and "position" not in error:
                break
            assert error["code"] in ("malformed_request", "position_gap", "position_too_old", "payload_mismatch",
                                     "non_finite_input", "queue_full")  # fmt: skip

    send()
    client.socket.send(json.dumps({"op": "open", "sessions": [{"handle": 3}]}))
    while isinstance(message := client.socket.recv(PATIENCE), bytes):  # outputs of the last examples
        replies(client.manifest, message)
    assert json.loads(message)["op"] == "opened"
