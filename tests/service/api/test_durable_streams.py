"""Streams of durable sessions over several servers: broken connections, moved sessions and lost rows."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from redis_server import RedisServer
from serving import RAW, Oracle, Running, Serve
from streams import Client, frame
from waiting import PATIENCE, until

from unroll.service.settings import Settings

Oracles = Callable[..., Oracle]
Dial = Callable[[Running], Client]


@pytest.fixture(scope="module")
def pair(few: Path, redis_process: RedisServer) -> Iterator[list[Running]]:
    pair = [Running(Settings.model_validate({"repository": few, "store": redis_process.url})) for _ in "12"]
    yield pair
    for running in pair:
        running.stop()


@pytest.fixture
def dial(oracle: Oracles) -> Iterator[Dial]:
    clients: list[Client] = []

    def call(running: Running) -> Client:
        clients.append(Client(running, oracle("lstm").manifest))
        return clients[-1]

    yield call
    for client in clients:
        with suppress(OSError):
            client.socket.close()


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((40, 30, 3)).astype("<f4")  # of 40 sessions


def test_stream_continues_on_another_server(pair: list[Running], dial: Dial, oracle: Oracles, x: np.ndarray):
    whole = [oracle("lstm")(x[i]) for i in range(40)]
    names: list[str] = []
    for turn in range(6):
        client = dial(pair[turn % 2])
        if not names:
            names = client.bind(*range(40))
        else:
            wanted = [{"handle": i, "session_id": name, "mode": "resume"} for i, name in enumerate(names)]
            assert {(item["position"], item["durability"]) for item in client.open(*wanted)} == {(4 * turn, "stored")}
        for t in range(4 * turn, 4 * turn + 4):
            for handle, reply in client.step(*[(i, t, x[i, t : t + 1]) for i in range(40)]).items():
                assert np.array_equal(reply.outputs[0][0], whole[handle][t])
        client.abort()


def test_two_streams_of_the_same_sessions(pair: list[Running], dial: Dial, oracle: Oracles, x: np.ndarray):
    """Each server's copy is stale at every step, and each server detects that itself."""
    first, second = dial(pair[0]), dial(pair[1])
    names = first.bind(*range(5))
    opened = second.open(*[{"handle": 7 + i, "session_id": name, "mode": "resume"} for i, name in enumerate(names)])
    assert not [item for item in opened if "error" in item]
    whole = [oracle("lstm")(x[i]) for i in range(5)]
    for t in range(20):
        client, shift = (first, 0) if t % 2 else (second, 7)
        for handle, reply in client.step(*[(shift + i, t, x[i, t : t + 1]) for i in range(5)]).items():
            assert np.array_equal(reply.outputs[0][0], whole[handle - shift][t])
            assert reply.position == t + 1
    replayed = first.step(*[(i, 19, x[i, 19:20]) for i in range(5)])
    assert all(np.array_equal(replayed[i].outputs[0][0], whole[i][19]) for i in range(5))
    assert first.refused(0, 12, x[0, 12:13])[0] == "position_too_old"
    code, error = second.refused(7, 25, x[0, :1])
    assert (code, error["expected"]) == ("position_gap", 20)


def test_another_server_sends_lost_replies_in_order(pair: list[Running], dial: Dial, oracle: Oracles, x: np.ndarray):
    first = dial(pair[0])
    (name,) = first.bind(0, depth=4)
    for at in range(0, 8, 2):
        first.socket.send(frame((0, at, x[0, at : at + 2])))
    rest = httpx.Client(base_url=pair[1].url)
    until(lambda: rest.get(f"/v1/models/lstm/sessions/{name}").json()["position"] == 8)
    first.abort()
    client = dial(pair[1])
    (resumed,) = client.open({"handle": 5, "session_id": name, "mode": "resume", "depth": 4})
    assert resumed["position"] == 8
    for at in range(0, 12, 2):
        client.socket.send(frame((5, at, x[0, at : at + 2])))
    good, bad = client.receive(6)
    assert not bad
    assert [reply.position for reply in good] == [2, 4, 6, 8, 10, 12]
    assert np.array_equal(np.concatenate([reply.outputs[0] for reply in good]), oracle("lstm")(x[0, :12]))
    rest.close()


def test_pipelined_chunks_of_a_moved_session_run_again_in_order(
    pair: list[Running], dial: Dial, oracle: Oracles, x: np.ndarray
):
    """Several chunks are in flight when the first turns out to use a stale state: all run again, in order."""
    client = dial(pair[0])
    (name,) = client.bind(0, depth=8)
    with httpx.Client(base_url=pair[1].url) as rest:
        url = f"/v1/models/lstm/sessions/{name}/steps"
        for t in range(0, 16, 4):
            assert rest.post(url, content=x[0, t : t + 1].tobytes(), headers=RAW).status_code == 200
            for at in range(t + 1, t + 4):
                client.socket.send(frame((0, None, x[0, at : at + 1])))
            good, bad = client.receive(3)
            assert not bad
            assert [reply.position for reply in good] == [t + 2, t + 3, t + 4]
            whole = oracle("lstm")(x[0, : t + 4])
            assert np.array_equal(np.concatenate([reply.outputs[0] for reply in good]), whole[t + 1 :])


def test_joined_steps_of_moved_sessions_run_again(pair: list[Running], dial: Dial, oracle: Oracles, x: np.ndarray):
    """The store refuses the joined steps: they run again on the state that the other server committed."""
    client, failed = dial(pair[0]), pair[0].model("lstm").scheduler.counters.failed
    contended = failed["session_contended"]
    names = client.bind(0, 1)
    with httpx.Client(base_url=pair[1].url) as rest:
        for t in range(0, 6, 2):
            for i, name in enumerate(names):
                url = f"/v1/models/lstm/sessions/{name}/steps"
                assert rest.post(url, content=x[i, t : t + 1].tobytes(), headers=RAW).status_code == 200
            with pair[0].in_one_turn():
                for i in range(2):
                    client.socket.send(frame((i, None, x[i, t + 1 : t + 2])))
            good, bad = client.receive(2)
            assert not bad
            for reply in good:
                assert reply.position == t + 2
                assert np.array_equal(reply.outputs[0], oracle("lstm")(x[reply.handle, : t + 2])[t + 1 :])
    assert failed["session_contended"] - contended >= 6  # each step, before it ran again


@pytest.mark.parametrize("durability", ["memory", "redis"])
def test_more_handles_than_rows(
    serve: Serve, redis_server: RedisServer, dial: Dial, oracle: Oracles, x: np.ndarray, durability: str
):
    running = serve(store=redis_server.url, session_capacity=8)
    client = dial(running)
    for begin in range(0, 40, 8):
        client.bind(*range(begin, begin + 8), durability=durability)
    for t in range(3):
        for begin in range(0, 40, 4):
            some = range(begin, begin + 4)
            for handle, reply in client.step(*[(i, t, x[i, t : t + 1]) for i in some]).items():
                assert np.array_equal(reply.outputs[0][0], oracle("lstm")(x[handle, : t + 1])[t])


def test_handle_refers_to_one_session(pair: list[Running], dial: Dial, x: np.ndarray):
    client, other = dial(pair[0]), dial(pair[1])
    (name,) = client.bind(0)
    client.step((0, 0, x[0, :1]))
    (opened,) = other.open({"handle": 1, "session_id": name, "mode": "resume"})
    assert opened["position"] == 1
    assert other.control("close", handles=[1]) == {"op": "closed", "sessions": [{"handle": 1, "position": 1}]}
    assert client.refused(0, 1, x[0, 1:2])[0] == "session_closed"
    (again,) = other.open({"handle": 1, "session_id": name})
    assert again["position"] == 0
    assert client.refused(0, 0, x[0, :1])[0] == "session_closed", "another session, which this handle never meant"
    (ended,) = client.control("close", handles=[0])["sessions"]
    assert ended["error"]["code"] == "session_closed"
    assert other.step((1, 0, x[0, :1]))[1].position == 1


def test_opening(pair: list[Running], dial: Dial):
    one, two = dial(pair[0]), dial(pair[1])

    def outcome(client: Client, handle: int, **wanted: object) -> str | int:
        (item,) = client.open({"handle": handle, **wanted})
        return item["error"]["code"] if "error" in item else item["position"]

    assert outcome(one, 0, session_id="s", mode="resume") == "session_unknown"
    assert outcome(one, 0, session_id="s", mode="either") == 0
    assert outcome(two, 0, session_id="s", mode="new") == "session_exists"
    assert outcome(two, 0, session_id="s", mode="either") == 0
    assert outcome(two, 0, session_id="t") == "malformed_request", "the handle is taken"
    twice = two.open({"handle": 1, "session_id": "u"}, {"handle": 1, "session_id": "v"}, {"handle": 2})
    assert [item.get("error", {}).get("code") for item in twice] == [None, "malformed_request", None]


def test_stream_survives_a_store_outage(serve: Serve, tmp_path: Path, dial: Dial, oracle: Oracles, x: np.ndarray):
    server = RedisServer(tmp_path, appendfsync="always")
    server.start()
    try:
        running = serve(store=server.url)
        client = dial(running)
        client.bind(0)
        client.bind(1, durability="memory")
        client.step((0, 0, x[0, :1]), (1, 0, x[1, :1]))
        server.kill()
        client.socket.send(frame((0, 1, x[0, 1:2]), (1, 1, x[1, 1:2])))
        (good,), (bad,) = client.receive(2)
        assert (good.handle, bad["handle"], bad["code"]) == (1, 0, "store_unavailable")
        server.start()
        assert np.array_equal(client.step((0, 1, x[0, 1:2]))[0].outputs[0], oracle("lstm")(x[0, :2])[1:])
    finally:
        server.kill()


def test_opening_is_dropped_when_the_client_goes(serve: Serve, redis_server: RedisServer, dial: Dial):
    running = serve(store=redis_server.url, store_timeout=PATIENCE)
    client = dial(running)
    (stream,) = running.server.streams
    redis_server.pause()
    try:
        opening = [{"handle": i, "session_id": f"dropped-{i}"} for i in range(300)]
        client.socket.send(json.dumps({"op": "open", "sessions": opening}))
        until(lambda: stream._control.running, "the request at the store")
        client.abort()
        until(lambda: not running.server.streams, "the end of the stream")
    finally:
        redis_server.resume()
    with httpx.Client(base_url=running.url) as other:
        for _ in range(2):  # after the lookups and their follow-up work
            other.post("/v1/models/lstm/sessions").raise_for_status()
        for spec in opening[:3] + opening[-3:]:
            assert other.get(f"/v1/models/lstm/sessions/{spec['session_id']}").status_code == 404


def test_closing_is_finished_when_the_client_goes(serve: Serve, redis_server: RedisServer, dial: Dial):
    running = serve(store=redis_server.url, store_timeout=PATIENCE)
    client = dial(running)
    names = client.bind(*range(300))
    client.socket.send(json.dumps({"op": "close", "handles": list(range(300))}))
    client.abort()
    with httpx.Client(base_url=running.url) as other:
        until(lambda: other.get(f"/v1/models/lstm/sessions/{names[-1]}").status_code == 410, "the end of the sessions")


def test_an_unexpected_error_at_the_store_is_answered(
    serve: Serve, redis_server: RedisServer, dial: Dial, monkeypatch: pytest.MonkeyPatch, x: np.ndarray
):
    running = serve(store=redis_server.url)
    client = dial(running)
    client.bind(0)

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(running.server.sessions, "create", fail)
        answer = client.control("open", sessions=[{"handle": 1}])
        assert (answer["op"], answer["code"]) == ("error", "engine_failed")
    client.bind(1)
    assert client.step((0, None, x[0, :1]), (1, None, x[1, :1])).keys() == {0, 1}


def test_memory_sessions_that_were_spilled_to_the_store(
    serve: Serve, redis_server: RedisServer, dial: Dial, oracle: Oracles, x: np.ndarray
):
    running = serve(store=redis_server.url, session_capacity=2, spill_bytes=0)
    client, whole = dial(running), [oracle("lstm")(x[i, :3]) for i in range(6)]
    client.open(*({"handle": handle, "durability": "memory"} for handle in range(6)))
    for t in range(3):
        for handle in range(6):
            assert np.array_equal(
                client.step((handle, t, x[handle, t : t + 1]))[handle].outputs[0][0], whole[handle][t]
            )
    client.socket.send(json.dumps({"op": "close", "handles": [*range(5)]}))
    closed = json.loads(client.socket.recv())
    assert closed["sessions"] == [{"handle": handle, "position": 3} for handle in range(5)]
    running.uvicorn.should_exit = True
    goodbye = json.loads(client.socket.recv())
    assert [(item["handle"], item["position"]) for item in goodbye["sessions"]] == [(5, 3)]


def test_sessions_that_displace_each_other_are_closed_together(
    serve: Serve, redis_server: RedisServer, dial: Dial, x: np.ndarray
) -> None:
    """Each session is loaded from the store to be closed, and may lose its row again immediately."""
    client = dial(serve(store=redis_server.url, session_capacity=1, spill_bytes=0))
    client.open(*({"handle": handle, "durability": "memory"} for handle in range(16)))
    for handle in range(16):
        client.step((handle, 0, x[handle % 6, :1]))
    client.socket.send(json.dumps({"op": "close", "handles": [*range(16)]}))
    closed = json.loads(client.socket.recv())
    assert closed["sessions"] == [{"handle": handle, "position": 1} for handle in range(16)]
