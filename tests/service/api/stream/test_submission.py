"""Frames compared with the model run over the whole input: no step is lost, doubled or mixed up."""

import json
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from fake_link import Wire
from serving import Oracle, Running, Serve, raw_steps
from streams import Dial, frame
from waiting import reached, until
from websockets.sync.client import connect

from unroll.bundle import Manifest

Oracles = Callable[..., Oracle]


def inputs_of(manifest: Manifest, rng: np.random.Generator, steps: int) -> list[np.ndarray]:
    return [
        rng.integers(0, spec.limit, (steps, *spec.shape)).astype(spec.numpy)
        if spec.limit
        else rng.standard_normal((steps, *spec.shape)).astype(spec.numpy)
        for spec in manifest.inputs
    ]


def test_frames_of_hundreds_of_sessions(any_server: Running, dial: Dial, oracle: Oracles, rng: np.random.Generator):
    """More sessions than fit one batch, in a new order each time and sometimes only a part."""
    client, model = dial(running=any_server), oracle("lstm")
    whole = rng.standard_normal((300, 7, 3)).astype("<f4")
    client.bind(*range(300))
    got: dict[int, list[np.ndarray]] = {handle: [] for handle in range(300)}
    at = [0] * 300
    for steps in (1, 2, 1, 3):
        for handles in np.array_split(rng.permutation(300), rng.integers(1, 4)):
            positions = [None if handle % 5 == 0 else at[handle] for handle in handles]
            sent = [(h, p, whole[h, at[h] : at[h] + steps]) for h, p in zip(handles.tolist(), positions, strict=True)]
            for handle, reply in client.step(*sent).items():
                at[handle] += steps
                assert (reply.steps, reply.position) == (steps, at[handle])
                got[handle].append(reply.outputs[0])
    for handle, outputs in got.items():
        assert np.array_equal(np.concatenate(outputs), model(whole[handle]))


@pytest.mark.parametrize("name", ["lstm", "gru", "last", "tokens", "two"])
def test_chunks_of_any_length_together(
    any_server: Running, dial: Dial, oracle: Oracles, rng: np.random.Generator, name: str
):
    version = "2" if name == "gru" else "1"
    client, model = dial(name, running=any_server), oracle(name, version)
    handles = [4, 0, 2**32 - 2, 17, 3]
    client.bind(*handles)
    whole = {handle: inputs_of(client.manifest, rng, 400) for handle in handles}
    at = dict.fromkeys(handles, 0)
    for lengths in ([1, 2, 200, 1, 3], [2, 2, 2, 2, 2], [64, 65, 1, 128, 2], [1], [7]):
        sent = []
        for handle, steps in zip(handles, lengths, strict=False):
            begin, at[handle] = at[handle], at[handle] + steps
            sent.append((handle, begin, *[array[begin : at[handle]] for array in whole[handle]]))
        for handle, reply in client.step(*sent).items():
            end = at[handle]
            assert reply.position == end
            expected, _ = model.all(*[array[:end] for array in whole[handle]])
            for spec, array, output in zip(client.manifest.outputs, expected, reply.outputs, strict=True):
                assert np.array_equal(output, array[end - reply.steps :] if spec.time else array)


def test_single_entry_frames(any_server: Running, dial: Dial, oracle: Oracles, x: np.ndarray):
    client = dial(running=any_server)
    client.bind(0)
    got = [client.step((0, None, x[i : i + 1]))[0].outputs[0] for i in range(len(x))]
    assert np.array_equal(np.concatenate(got), oracle("lstm")(x))


async def test_single_entry_frames_join_and_are_cancelled_with_their_connection(wire: Wire):
    await wire.bind(3)
    wire.engine.release()
    (model,) = wire.server.models
    for answers in (3, 5):
        await reached(lambda: not model.scheduler.in_flight)
        wire.frame(range(1))
        wire.connection.on_binary(frame((1, None, np.full((1, 3), 1 if answers == 3 else np.nan, "<f4"))))
        wire.frame(range(2, 3))
        assert model.scheduler.in_flight == 3
        await reached(lambda count=answers: len(wire.answered()) == count)
    assert [(reply.handle, reply.position) for reply in wire.answered()[3:]] == [(0, 2), (2, 2)]
    (refused,) = (message for message in wire.sent if isinstance(message, dict))
    assert (refused["handle"], refused["code"]) == (1, "non_finite_input")
    await reached(lambda: not model.scheduler.in_flight)
    wire.frame(range(1))
    wire.frame(range(1, 2))
    assert model.scheduler.in_flight == 2
    wire.connection.close()
    assert model.scheduler.in_flight == 0


def test_the_largest_frame(dial: Dial, oracle: Oracles, rng: np.random.Generator):
    client = dial()
    for first in range(0, 4096, 1024):
        client.bind(*range(first, first + 1024))
    x = rng.standard_normal((4096, 1, 3)).astype("<f4")
    answers = client.step(*[(handle, 0, x[handle]) for handle in range(4096)])
    for handle in range(0, 4096, 97):
        assert np.array_equal(answers[handle].outputs[0], oracle("lstm")(x[handle]))
    assert client.control("close", handles=list(range(4096)))["sessions"][5] == {"handle": 5, "position": 1}


def test_a_session_twice_in_a_frame(dial: Dial, oracle: Oracles, x: np.ndarray):
    """The entries run in order, if the session's retry depth allows that many chunks at once."""
    client = dial()
    client.bind(0, depth=3)
    client.bind(1)
    client.socket.send(frame((0, 0, x[:2]), (1, 0, x[:2]), (0, 2, x[2:4]), (0, None, x[4:6])))
    good, _ = client.receive(4)
    ours = sorted((reply for reply in good if reply.handle == 0), key=lambda reply: reply.position)
    assert np.array_equal(np.concatenate([reply.outputs[0] for reply in ours]), oracle("lstm")(x[:6]))


def test_rest_and_stream_share_sessions(dial: Dial, client: httpx.Client, oracle: Oracles, x: np.ndarray):
    ours = dial()
    (name,) = ours.bind(0)
    path = f"/v1/models/lstm/sessions/{name}"
    first = ours.step((0, 0, x[:4]))[0].outputs[0]
    answer = client.post(f"{path}/steps", content=x[4:8].tobytes(), headers=raw_steps(x[4:8]))
    assert answer.headers["unroll-position"] == "8"
    last = ours.step((0, 8, x[8:]))[0].outputs[0]
    between = np.frombuffer(answer.content, "<f4").reshape(-1, 2)
    assert np.array_equal(np.concatenate([first, between, last]), oracle("lstm")(x))
    again = client.post(f"{path}/steps", content=x[8:].tobytes(), headers={**raw_steps(x[8:]), "Unroll-Position": "8"})
    assert again.content == last.tobytes()


def test_a_retry_gets_the_same_bytes(any_server: Running, dial: Dial, oracle: Oracles, x: np.ndarray):
    """In a frame of its own, in a shared frame, and from another connection."""
    client = dial(running=any_server)
    names = client.bind(0, 1, 2)
    first = client.step((0, 0, x[:3]), (1, 0, x[3:6]), (2, 0, x[:1]))
    again = client.step((1, 0, x[3:6]), (2, 1, x[1:2]), (0, 0, x[:3]))
    for handle in (0, 1):
        assert (again[handle].position, again[handle].content) == (3, first[handle].content)
    assert np.array_equal(again[2].outputs[0], oracle("lstm")(x[:2])[1:])
    other = dial(running=any_server)
    other.open({"handle": 7, "session_id": names[0], "mode": "resume"})
    for _ in range(2):
        reply = other.step((7, 0, x[:3]))[7]
        assert (reply.position, reply.content) == (3, first[0].content)
    assert np.array_equal(other.step((7, 3, x[3:]))[7].outputs[0], oracle("lstm")(x)[3:])


@pytest.mark.parametrize("steps", [1, 2])
def test_refusals_by_position(dial: Dial, client: httpx.Client, oracle: Oracles, x: np.ndarray, steps: int):
    ours = dial()
    (name,) = ours.bind(0)
    state = f"/v1/models/lstm/sessions/{name}/state"
    for at in range(0, 3 * steps, steps):
        ours.step((0, at, x[at : at + steps]))
    end, before = 3 * steps, client.get(state).content
    for position, sent, code in [
        (end + 1, x[:1], "position_gap"),
        (2**63, x[:1], "position_gap"),
        (end - 2 * steps, x[end - 2 * steps : end - steps], "position_too_old"),
        (end - steps, x[:steps], "payload_mismatch"),
        (end - steps, x[end - steps : end + 1], "payload_mismatch"),
    ]:
        found, error = ours.refused(0, position, sent)
        assert (found, error["expected"]) == (code, end)
    assert client.get(state).content == before
    assert np.array_equal(ours.step((0, end, x[end:]))[0].outputs[0], oracle("lstm")(x)[end:])


def test_a_chunk_older_than_the_retry_depth(dial: Dial, x: np.ndarray):
    client = dial()
    client.bind(0, depth=2)
    for at in range(0, 6, 2):
        client.step((0, at, x[at : at + 2]))
    assert client.refused(0, 0, x[:2])[0] == "position_too_old"
    assert client.step((0, 2, x[2:4]))[0].position == 4
    assert client.step((0, 4, x[4:6]))[0].position == 6


def test_pipelining(any_server: Running, dial: Dial, oracle: Oracles, x: np.ndarray):
    """As many chunks wait as the session was opened for; one more is refused, and later ones leave a position gap."""
    client = dial(running=any_server)
    client.bind(0, depth=3)
    (stream,) = any_server.server.streams
    with any_server.holding("lstm") as held:
        client.socket.send(frame((0, 0, x[:2])))
        held.wait()
        for at in range(2, 10, 2):
            client.socket.send(frame((0, at, x[at : at + 2])))
        until(lambda: "3 entries" in repr(stream))
        _, errors = client.receive(2)
    assert [(error["position"], error["code"]) for error in errors] == [(6, "queue_full"), (8, "position_gap")]
    assert errors[0]["retry_after"] >= 0
    good, _ = client.receive(3)
    assert np.array_equal(np.concatenate([reply.outputs[0] for reply in good]), oracle("lstm")(x[:6]))
    assert client.step((0, 6, x[6:8]))[0].position == 8


def test_a_retry_of_a_running_chunk_does_not_count_against_the_depth(dial: Dial, server: Running, x: np.ndarray):
    client = dial()
    client.bind(0)
    (stream,) = server.server.streams
    with server.holding("lstm") as held:
        client.socket.send(frame((0, 0, x[:2])))
        held.wait()
        client.socket.send(frame((0, 0, x[:2])))
        until(lambda: "2 entries" in repr(stream))
    good, _ = client.receive(2)
    assert {(reply.position, reply.content) for reply in good} == {(2, good[0].content)}


def test_a_frame_of_outputs_says_if_a_reply_was_not_kept(serve: Serve):
    running, x = serve(reply_bytes=0), np.zeros((2, 3), np.float32)
    with connect(f"ws://{running.address}/v1/models/lstm/stream", compression=None) as socket:
        socket.send(json.dumps({"op": "open", "sessions": [{"handle": handle} for handle in (0, 1)]}))
        socket.recv()
        for entries, flag in (([(0, 0, x)], 1), ([(0, 2, x), (1, 0, x)], 1), ([(0, 4, x[:1]), (1, 2, x[:1])], 0)):
            socket.send(frame(*entries))
            assert socket.recv()[:2] == bytes([2, flag])
        socket.send(frame((0, 2, x)))
        assert json.loads(socket.recv())["code"] == "position_too_old"
