"""Steps in JSON and rollouts on a stream, compared with plain onnxruntime."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serving import Oracle, Running, Serve, SlowEngine
from streams import Client, Dial, frame, last_messages
from waiting import PATIENCE, until

Oracles = Callable[..., Oracle]
#: The map of a model with three inputs and two outputs.
COLUMNS = {"kind": "columns", "columns": [{"from": 1}, {"from": 0, "scale": 2.0}, {"constant": 0.5}]}


def fed(y: np.ndarray) -> np.ndarray:
    return np.array([y[1], float(y[0]) * 2.0, 0.5]).astype(np.float32)


def rolled_by_hand(oracle: Oracle, x: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the inputs and outputs of the steps after x."""
    for _ in range(steps):
        x = np.concatenate([x, fed(oracle(x)[-1])[np.newaxis]])
    return x[-steps:], oracle(x)[-steps:]


def message(client: Client) -> Any:
    received = client.socket.recv(PATIENCE)
    return json.loads(received) if isinstance(received, str) else received


def roll(client: Client, **members: Any) -> tuple[list[tuple[int, np.ndarray]], dict]:
    """Return (position, values) of each frame, and the final message."""
    client.socket.send(json.dumps({"op": "rollout", "handle": 0, "map": COLUMNS, **members}))
    found = []
    while isinstance(received := message(client), bytes):
        kind, flags, reserved, entries, handle, steps, position = struct.unpack_from("<BBHIIIQ", received)
        assert (kind, flags, reserved, entries, handle) == (3, 0, 0, 1, 0)
        found.append((position, np.frombuffer(received, "<f4", offset=24)))
        assert len(found[-1][1]) % steps == 0
    return found, received


# ── steps ────────────────────────────────────────────────────────────────────────────────────────


def test_steps_in_json_are_those_of_frames(dial: Dial, oracle: Oracles, x: np.ndarray) -> None:
    client = dial()
    client.bind(0)
    right = oracle("lstm")(x)
    answer = client.control("steps", handle=0, inputs=x[:2].tolist(), position=0)
    assert np.array_equal(np.float32(answer.pop("outputs")), right[:2])
    assert answer == {"op": "outputs", "handle": 0, "position": 2, "reply_kept": True}
    assert np.array_equal(client.step((0, 2, x[2:3]))[0].outputs[0], right[2:3])
    answer = client.control("steps", handle=0, inputs={"x": x[3:4].tolist()})
    assert (answer["position"], np.float32(answer["outputs"]).tolist()) == (4, right[3:4].tolist())
    assert client.control("steps", handle=0, inputs=x[3:4].tolist(), position=3) == answer, "a retry"


def test_json_and_frames_of_one_session_keep_their_order(
    dial: Dial, server: Running, oracle: Oracles, x: np.ndarray
) -> None:
    client = dial()
    client.bind(0, 1, depth=4)
    with server.holding("lstm") as held:
        client.socket.send(frame((0, 0, x[:1]), (1, 0, x[:1])))
        held.wait()
        client.socket.send(json.dumps({"op": "steps", "handle": 0, "inputs": x[1:2].tolist()}))
        client.socket.send(frame((0, None, x[2:3])))
    right = oracle("lstm")(x)
    received = [message(client) for _ in range(3)]
    assert struct.unpack_from("<BBHI", received[0])[3] == 2
    assert np.array_equal(np.float32(received[1]["outputs"]), right[1:2])
    assert np.array_equal(np.frombuffer(received[2], "<f4", offset=24), right[2])


@pytest.mark.parametrize("store", [False, True])
def test_the_answer_has_the_rows_of_its_batch_if_asked_for(
    serve: Serve, dial: Dial, server: Running, x: np.ndarray, tmp_path: Path, store: bool
) -> None:
    running = serve(store=tmp_path.as_uri()) if store else server
    client, scheduler = dial(running=running), running.model("lstm").scheduler
    client.bind(0, 1, 2, 3)

    def send(handle: int) -> None:
        steps = {"op": "steps", "handle": handle, "inputs": x[:1].tolist(), "position": 0, "batch_rows": handle != 3}
        client.socket.send(json.dumps(steps))

    with running.holding("lstm") as held:
        send(0)
        held.wait()
        for handle in (1, 2, 3):
            send(handle)
        until(lambda: scheduler.in_flight == 4)
    answers = {answer["handle"]: answer for answer in (message(client) for _ in range(4))}
    assert [answers[handle]["batch_rows"] for handle in (0, 1, 2)] == [1, 3, 3]
    assert "batch_rows" not in answers[3]
    send(1)
    assert message(client) == answers[1] | {"batch_rows": None}, "a reply that was kept"


def test_invalid_json_steps_are_refused(dial: Dial, x: np.ndarray) -> None:
    client = dial()
    client.bind(0)
    for members, code in (
        ({"inputs": [[1, 2]]}, "invalid_shape"),
        ({"inputs": []}, "invalid_shape"),
        ({"inputs": [["1", 2, 3]]}, "invalid_dtype"),
        ({"inputs": [[1, 2, 10**400]]}, "non_finite_input"),
        ({"inputs": x[:1].tolist(), "position": 7}, "position_gap"),
        ({"inputs": x[:1].tolist(), "handle": 5}, "malformed_request"),
    ):
        answer = client.control("steps", **{"handle": 0, **members})
        assert (answer["op"], answer["code"]) == ("error", code)
        assert (answer["handle"], answer["position"]) == (members.get("handle", 0), members.get("position"))
    for members in ({}, {"inputs": x[:1].tolist(), "position": -1}, {"inputs": x[:1].tolist(), "more": 1}):
        assert client.control("steps", **{"handle": 0, **members})["code"] == "malformed_request"
    assert client.control("steps", handle=0, inputs=x[:1].tolist())["position"] == 1


def test_a_resent_chunk_keeps_its_cut(dial: Dial, x: np.ndarray) -> None:
    client = dial()
    client.bind(0, depth=2)
    first = client.step((0, 0, x[:3]))[0].content
    assert client.step((0, 0, x[:3]))[0].content == first
    assert client.refused(0, 0, x[:2])[0] == "payload_mismatch"
    assert client.refused(0, 1, x[1:3])[0] == "position_too_old"


def test_one_wrong_session_refuses_the_whole_open(dial: Dial) -> None:
    client = dial()
    error = client.control("open", sessions=[{"handle": 0}, {"handle": 1, "mode": "old"}])
    assert error.keys() == {"op", "code", "detail"}
    assert "sessions.1.mode" in error["detail"]
    assert client.control("detach", handles=[0])["handle"] == 0, "it was not opened"


# ── rollouts ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("on", ["fork", "session"])
def test_a_rollout_in_frames(dial: Dial, oracle: Oracles, x: np.ndarray, on: str) -> None:
    client = dial()
    client.bind(0, 1)
    last = client.control("steps", handle=0, inputs=x.tolist())["outputs"][-1]
    inputs, outputs = rolled_by_hand(oracle("lstm"), x, 5)
    found, end = roll(client, steps=5, on=on, outputs=last, position=12)
    assert end == {"op": "rolled", "handle": 0, "position": 17, "reply_kept": True}
    assert [position for position, _ in found] == [13, 14, 15, 16, 17]
    assert np.array_equal([values for _, values in found], np.concatenate([inputs, outputs], axis=1))
    if on == "session":
        assert roll(client, steps=5, on=on, outputs=last, position=12)[1] == end, "a retry"
        assert client.control("steps", handle=0, inputs=x[:1].tolist())["position"] == 18
    else:
        (_, values), *_ = roll(client, steps=5, send="outputs", steps_per_event=5)[0]
        assert np.array_equal(values.reshape(5, 2), outputs)


def test_a_rollout_in_json(dial: Dial, oracle: Oracles, x: np.ndarray) -> None:
    client = dial()
    client.bind(0)
    client.socket.send(
        json.dumps({"op": "rollout", "handle": 0, "steps": 2, "map": COLUMNS, "inputs": x.tolist(), "values": "json"})
    )
    given, one, two, end = [message(client) for _ in range(4)]
    inputs, outputs = rolled_by_hand(oracle("lstm"), x, 2)
    assert np.array_equal(np.float32(given["outputs"]), oracle("lstm")(x))
    for step, fed_in, y in zip((one, two), inputs, outputs, strict=True):
        assert step["op"] == "rolling"
        assert np.array_equal(np.float32(step["inputs"]), fed_in[np.newaxis])
        assert np.array_equal(np.float32(step["outputs"]), y[np.newaxis])
    assert end == {"op": "rolled", "handle": 0, "position": 14, "reply_kept": True}


def test_a_message_behind_a_rollout_does_not_overtake_it(dial: Dial, oracle: Oracles, x: np.ndarray) -> None:
    client = dial()
    client.bind(0)
    client.control("steps", handle=0, inputs=x[:2].tolist())
    rollout = {"op": "rollout", "handle": 0, "steps": 3, "map": COLUMNS, "position": 2, "send": "outputs"}
    client.socket.send(json.dumps(rollout))
    client.socket.send(frame((0, 2, x[2:3])))
    frames = [message(client) for _ in range(5)]
    (reply,) = [received for received in frames if isinstance(received, bytes) and received[0] == 2]
    assert np.array_equal(np.frombuffer(reply, "<f4", offset=24), oracle("lstm")(x[:3])[2])
    rolled = [np.frombuffer(f, "<f4", offset=24) for f in frames if isinstance(f, bytes) and f[0] == 3]
    assert np.array_equal(rolled, rolled_by_hand(oracle("lstm"), x[:2], 3)[1])


def test_other_steps_interleave_with_a_rollout_and_stop_ends_it(dial: Dial, server: Running, x: np.ndarray) -> None:
    client, scheduler = dial(), server.model("lstm").scheduler
    client.bind(0, 1)
    run = scheduler.counters.rollout_steps
    with SlowEngine(server.model("lstm").loop, 0.005):
        client.control("steps", handle=0, inputs=x.tolist())
        client.socket.send(
            json.dumps(
                {"op": "rollout", "handle": 0, "steps": 4096, "map": COLUMNS, "inputs": x.tolist(), "on": "session"}
            )
        )
        for i in range(5):
            client.socket.send(frame((1, i, x[i : i + 1])))
            while (received := message(client))[0] == 3:
                pass
            assert struct.unpack_from("<BBHIIIQ", received)[4:] == (1, 1, i + 1)
        client.socket.send(json.dumps({"op": "rollout", "handle": 0, "steps": 1, "map": COLUMNS}))
        while isinstance(received := message(client), bytes):
            pass
        assert (received["code"], received["detail"]) == ("malformed_request", "handle 0 has a rollout already")
        client.socket.send(json.dumps({"op": "stop", "handle": 0}))
        while isinstance(received := message(client), bytes):
            pass
        assert received == {"op": "stopped", "handle": 0}
        until(lambda: not len(scheduler.rollouts))
    assert 0 < scheduler.counters.rollout_steps - run < 4096
    assert client.control("steps", handle=0, inputs=x[:1].tolist())["position"] == 13, "nothing of it was applied"


@pytest.mark.parametrize("how", ["close", "detach", "leave"])
def test_a_rollout_ends_with_its_handle(dial: Dial, server: Running, x: np.ndarray, how: str) -> None:
    client, scheduler = dial(), server.model("lstm").scheduler
    client.bind(0)
    with SlowEngine(server.model("lstm").loop, 0.005):
        client.socket.send(
            json.dumps({"op": "rollout", "handle": 0, "steps": 4096, "map": COLUMNS, "inputs": x.tolist()})
        )
        assert isinstance(message(client), bytes)
        if how == "leave":
            client.abort()
        else:
            client.socket.send(json.dumps({"op": how, "handles": [0]}))
            while isinstance(received := message(client), bytes):
                pass
            assert received["op"] in {"closed", "detached"}
        until(lambda: not len(scheduler.rollouts))


def test_a_server_that_ends_finishes_its_rollouts_first(serve: Serve, dial: Dial, x: np.ndarray) -> None:
    running = serve()
    client = dial(running=running)
    client.bind(0)
    rollout = {"op": "rollout", "handle": 0, "steps": 40, "map": COLUMNS, "inputs": x.tolist()}
    with SlowEngine(running.model("lstm").loop, 0.002):
        client.socket.send(json.dumps(rollout))
        assert isinstance(message(client), bytes)
        running.uvicorn.should_exit = True
        *frames, rolled, closing = last_messages(client)
    assert [struct.unpack_from("<Q", each, 16)[0] for each in frames] == list(range(13, 53))  # type: ignore[arg-type]
    assert json.loads(rolled) == {"op": "rolled", "handle": 0, "position": 52, "reply_kept": True}
    assert json.loads(closing)["op"] == "closing"


def test_refusals_of_rollouts_name_their_handle(dial: Dial, server: Running, x: np.ndarray) -> None:
    client = dial()
    (session_id,) = client.bind(0)
    for members, code in (
        ({"steps": 2}, "malformed_request"),  # no outputs to start from
        ({"steps": 2, "inputs": x.tolist(), "map": {"kind": "identity"}}, "map_invalid"),
        ({"steps": 5000, "inputs": x.tolist()}, "invalid_shape"),
        ({"steps": 2, "inputs": x.tolist(), "position": 3}, "position_gap"),
        ({"steps": 2, "inputs": x.tolist(), "handle": 4}, "malformed_request"),
    ):
        found, error = roll(client, **members)
        assert not found
        assert (error["op"], error["code"], error["handle"]) == ("error", code, members.get("handle", 0))
        assert error["position"] == members.get("position")
    assert roll(client, steps=2, inputs=x.tolist(), position=2**64)[1]["code"] == "malformed_request"
    httpx.delete(f"{server.url}/v1/models/lstm/sessions/{session_id}")
    httpx.post(f"{server.url}/v1/models/lstm/sessions", json={"session_id": session_id})
    for on in ("fork", "session"):
        assert roll(client, steps=2, inputs=x.tolist(), on=on)[1]["code"] == "session_closed"
