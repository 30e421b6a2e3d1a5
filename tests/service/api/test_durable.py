"""Durable sessions over several servers with one store: any server takes the next step, and each step runs once."""

import asyncio
import base64
import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import httpx
import numpy as np
import pytest
from redis_server import RedisServer
from serving import RAW, Oracle, Running, Serve, raw_steps
from waiting import PATIENCE, until
from wire import infer, outputs

from unroll.service.core.clock import ManualClock
from unroll.service.core.errors import StoreUnavailable, UnrollError
from unroll.service.settings import Settings
from unroll.service.store.interface import Commit, Key

Oracles = Callable[..., Oracle]
Background = Callable[..., Future]


class Replicas:
    """Servers with one store, and a client per server. `any` picks one at random."""

    def __init__(self, servers: list[Running], seed: int = 1) -> None:
        self.servers = servers
        self.clients = [httpx.Client(base_url=server.url) for server in servers]
        self._chance = random.Random(seed)

    @property
    def any(self) -> httpx.Client:
        return self._chance.choice(self.clients)

    def close(self) -> None:
        for client in self.clients:
            client.close()


def _together(few: Path, *settings: dict[str, object]) -> Iterator[Replicas]:
    made = Replicas([Running(Settings.model_validate({"repository": few, **each})) for each in settings])
    yield made
    made.close()
    for server in made.servers:
        server.stop()


@pytest.fixture(scope="module")
def replicas(few: Path, redis_process: RedisServer) -> Iterator[Replicas]:
    yield from _together(few, *[{"store": redis_process.url}] * 3)


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((40, 3)).astype("<f4")


def opened(client: httpx.Client, model: str = "lstm", **body: object) -> str:
    answer = client.post(f"/v1/models/{model}/sessions", json=body)
    assert answer.status_code == 201, answer.text
    return f"/v1/models/{model}/sessions/{answer.json()['session_id']}"


def step(client: httpx.Client, session: str, x: np.ndarray, position: int | None = None) -> httpx.Response:
    said = {} if position is None else {"Unroll-Position": str(position)}
    return client.post(f"{session}/steps", content=x.tobytes(), headers={**raw_steps(x), **said})


def values(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.frombuffer(answer.content, "<f4").reshape(-1, 2)


def code(answer: httpx.Response) -> str:
    return answer.json()["code"]


def test_any_server_takes_the_next_step(replicas: Replicas, oracle: Oracles, x: np.ndarray):
    session = opened(replicas.any)
    got = [values(step(replicas.any, session, x[i : i + 1], i)) for i in range(30)]
    got.append(values(step(replicas.any, session, x[30:40], 30)))
    assert np.array_equal(np.concatenate(got), oracle("lstm")(x))
    assert {client.get(session).json()["position"] for client in replicas.clients} == {40}
    assert {client.get(session).json()["durability"] for client in replicas.clients} == {"stored"}


def test_steps_without_a_position(replicas: Replicas, oracle: Oracles, x: np.ndarray):
    session = opened(replicas.any)
    got = [values(step(replicas.any, session, x[i : i + 1])) for i in range(40)]
    assert np.array_equal(np.concatenate(got), oracle("lstm")(x))


def test_a_retry_is_answered_the_same_by_any_server(replicas: Replicas, x: np.ndarray):
    session = opened(replicas.any)
    for i in range(8):
        first = step(replicas.any, session, x[i : i + 1], i)
        for client in replicas.clients:
            again = step(client, session, x[i : i + 1], i)
            assert (again.content, again.headers["Unroll-Position"]) == (first.content, str(i + 1))


def test_errors_reflect_the_state_in_the_store(replicas: Replicas, x: np.ndarray):
    one, two, _ = replicas.clients
    session = opened(one)
    step(one, session, x[:1], 0)
    for i in range(1, 5):
        step(two, session, x[i : i + 1], i)
    for client in replicas.clients:
        for position, expected in ((9, "position_gap"), (2, "position_too_old")):
            answer = step(client, session, x[:1], position)
            assert (answer.status_code, code(answer), answer.json()["expected"]) == (409, expected, 5)
        assert code(step(client, session, x[:1], 4)) == "payload_mismatch"
    assert values(step(one, session, x[5:6], 5)).shape == (1, 2)


def test_the_same_step_sent_to_all_at_once_counts_once(
    replicas: Replicas, oracle: Oracles, x: np.ndarray, background: Background
):
    session = opened(replicas.any)
    for i in range(12):
        sent = [background(step, client, session, x[i : i + 1], i) for client in replicas.clients for _ in range(2)]
        answers = {future.result().content for future in sent}
        assert len(answers) == 1
    assert replicas.any.get(session).json()["position"] == 12
    assert np.array_equal(values(step(replicas.any, session, x[11:12], 11)), oracle("lstm")(x[:12])[-1:])


def test_steps_from_everywhere_at_once_each_count(replicas: Replicas, background: Background, oracle: Oracles):
    """Without positions the order is undefined, but every step is applied."""
    session = opened(replicas.any)
    same = np.ones((1, 3), "<f4")
    sent = [background(step, client, session, same) for _ in range(5) for client in replicas.clients]
    answers = [future.result() for future in sent]
    done = sorted(int(a.headers["Unroll-Position"]) for a in answers if a.status_code == 200)
    assert all(a.status_code == 200 or code(a) == "session_contended" for a in answers)
    assert done == list(range(1, len(done) + 1))
    assert replicas.any.get(session).json()["position"] == len(done)
    whole = oracle("lstm")(np.repeat(same, len(done), axis=0))
    by_position = {int(a.headers["Unroll-Position"]): values(a) for a in answers if a.status_code == 200}
    assert all(np.array_equal(by_position[i + 1][0], whole[i]) for i in range(len(done)))


def test_open_close_and_reopen_are_visible_on_every_server(replicas: Replicas, x: np.ndarray, oracle: Oracles):
    one, two, three = replicas.clients
    session = opened(one, session_id="s")
    step(two, session, x[:1], 0)
    answer = three.post("/v1/models/lstm/sessions", json={"session_id": "s"})
    assert (answer.status_code, code(answer), answer.json()["position"]) == (409, "session_exists", 1)
    assert three.delete(session).json()["position"] == 1
    for client in replicas.clients:
        for answer in (step(client, session, x[1:2], 1), client.get(session), client.delete(session)):
            assert (answer.status_code, code(answer)) == (410, "session_closed")
    opened(two, session_id="s")
    assert np.array_equal(values(step(one, session, x[5:6], 0)), oracle("lstm")(x[5:6]))
    assert code(step(two, session, x[:1], 0)) == "payload_mismatch", "the old session's step is not this one's"


def test_restored_state_applies_on_every_server(replicas: Replicas, x: np.ndarray, oracle: Oracles):
    one, two, _ = replicas.clients
    session = opened(one)
    step(one, session, x[:3], 0)
    saved = two.get(f"{session}/state")
    assert saved.headers["Unroll-Position"] == "3"
    step(two, session, x[3:6], 3)
    assert one.put(f"{session}/state", content=saved.content, headers=RAW).json()["position"] == 3
    answer = step(two, session, x[6:9], 3)
    assert np.array_equal(values(answer), oracle("lstm")(np.concatenate([x[:3], x[6:9]]))[3:])


def test_fork_is_independent_of_its_origin(replicas: Replicas, x: np.ndarray, oracle: Oracles):
    session = opened(replicas.any)
    step(replicas.any, session, x[:4], 0)
    forked = replicas.any.post(f"{session}/fork", json={"session_id": "f"})
    assert (forked.status_code, forked.json()["position"]) == (201, 4)
    for target, more in ((session, x[4:6]), ("/v1/models/lstm/sessions/f", x[6:8])):
        answer = step(replicas.any, target, more, 4)
        assert np.array_equal(values(answer), oracle("lstm")(np.concatenate([x[:4], more]))[4:])


def test_sequences_of_the_open_inference_protocol(replicas: Replicas, x: np.ndarray, oracle: Oracles):
    whole = oracle("gru", "2")(x[:6])
    for i in range(6):
        options = {"sequence_id": "q", "sequence_start": i == 0, "sequence_end": i == 5, "sequence_position": i}
        first = infer(replicas.any, "gru", x[i : i + 1], **options)
        _, arrays = outputs(first)
        assert np.array_equal(arrays["y"][0, 0], whole[i])
        for client in replicas.clients:
            again = infer(client, "gru", x[i : i + 1], **options)
            assert again.content == first.content, (i, again.text)
    for client in replicas.clients:
        answer = infer(client, "gru", x[:1], sequence_id="q")
        assert (answer.status_code, code(answer)) == (410, "session_closed")
    _, arrays = outputs(infer(replicas.any, "gru", x[:1], sequence_id="q", sequence_start=True))
    _, arrays = outputs(infer(replicas.any, "gru", x[3:4], sequence_id="q", sequence_start=True))
    _, arrays = outputs(infer(replicas.any, "gru", x[4:5], sequence_id="q"))
    assert np.array_equal(arrays["y"][0, 0], oracle("gru", "2")(x[3:5])[1]), "START opens a new session at any replica"


def test_the_end_of_a_restarted_sequence_is_its_own(replicas: Replicas, redis_process: RedisServer, x: np.ndarray):
    client, first = replicas.any, {"sequence_id": "restarted", "sequence_start": True, "sequence_position": 0}
    outputs(infer(client, "gru", x[:1], **first))
    outputs(infer(client, "gru", x[1:2], sequence_id="restarted", sequence_start=True))
    redis_process.client.delete("unroll:{gru/restarted}")  # as if it had expired
    answer = infer(client, "gru", x[2:3], sequence_id="restarted")
    assert (answer.status_code, code(answer)) == (410, "session_expired")
    outputs(infer(client, "gru", x[:1], **first))  # no duplicate of the step that opened the session that expired


def test_session_continues_after_every_server_restarts(
    serve: Serve, redis_server: RedisServer, x: np.ndarray, oracle: Oracles
):
    got = []
    session = ""
    for i in range(3):
        running = serve(store=redis_server.url)
        with httpx.Client(base_url=running.url) as client:
            session = session or opened(client)
            got.append(values(step(client, session, x[5 * i : 5 * i + 5], 5 * i)))
            again = step(client, session, x[5 * i : 5 * i + 5], 5 * i)
            assert again.content == got[-1].tobytes()
    assert np.array_equal(np.concatenate(got), oracle("lstm")(x[:15]))


def test_store_decides_expiry(serve: Serve, redis_server: RedisServer, x: np.ndarray):
    clock = ManualClock()
    running = serve(clock, store=redis_server.url, idle_timeout=1000.0)
    with httpx.Client(base_url=running.url) as client:
        session = opened(client, session_id="e")
        step(client, session, x[:1], 0)
        clock.advance(2000)  # it was idle here; another server may have used it
        assert step(client, session, x[1:2], 1).status_code == 200
        redis_server.client.delete("unroll:{lstm/e}")
        answer = step(client, session, x[2:3], 2)
        assert (answer.status_code, code(answer)) == (410, "session_expired")
        redis_server.flush()
        session = opened(client, session_id="f")
        redis_server.flush()
        answer = step(client, session, x[:1], 0)
        assert (answer.status_code, code(answer)) == (404, "session_unknown")


def test_more_sessions_than_rows(serve: Serve, redis_server: RedisServer, x: np.ndarray, oracle: Oracles):
    running = serve(store=redis_server.url, session_capacity=2, spill_bytes=0)
    whole = oracle("lstm")(x[:4])
    with httpx.Client(base_url=running.url) as client:
        durable = [opened(client) for _ in range(6)]
        memory = [opened(client, durability="memory") for _ in range(6)]
        for i in range(4):
            for session in (*durable, *memory):
                assert np.array_equal(values(step(client, session, x[i : i + 1], i))[0], whole[i]), (session, i)
        # A spilled session belongs to its replica only, and memory sessions leave no record in the store.
        stored = {key.decode() for key in redis_server.client.scan_iter()}
        assert all(f"unroll:{{lstm/{s.rsplit('/', 1)[1]}}}" in stored for s in durable)


def test_requests_that_need_a_store_are_refused_without_one(serve: Serve, x: np.ndarray):
    running = serve()
    with httpx.Client(base_url=running.url) as client:
        for durability in ("redis", "client"):
            answer = client.post("/v1/models/lstm/sessions", json={"durability": durability})
            assert (answer.status_code, code(answer)) == (422, "durability_unavailable")
        assert client.get(opened(client)).json()["durability"] == "memory"


def test_store_outage_is_reported(serve: Serve, tmp_path: Path, x: np.ndarray, oracle: Oracles):
    server = RedisServer(tmp_path, appendfsync="always")
    server.start()
    running = serve(store=server.url)
    try:
        with httpx.Client(base_url=running.url) as client:
            durable, memory = opened(client), opened(client, durability="memory")
            step(client, durable, x[:1], 0)
            server.kill()
            answer = step(client, durable, x[1:2], 1)
            assert (answer.status_code, code(answer)) == (503, "store_unavailable")
            assert int(answer.headers["Retry-After"]) >= 1
            assert code(client.post("/v1/models/lstm/sessions", json={})) == "store_unavailable"
            assert step(client, memory, x[:1], 0).status_code == 200
            assert client.get("/readyz").status_code == 200
            server.start()
            assert np.array_equal(values(step(client, durable, x[1:2], 1)), oracle("lstm")(x[:2])[1:])
    finally:
        server.kill()


# ── client-held states ───────────────────────────────────────────────────────────────────────────

OLD, NEW = "an old key of 16+ bytes", "a new key of 16+ bytes"


@pytest.fixture(scope="module")
def holders(few: Path) -> Iterator[Replicas]:
    """Servers without a store. The second has a new key and also accepts the old one."""
    yield from _together(few, {"snapshot_keys": [OLD]}, {"snapshot_keys": [NEW, OLD]})


def hold(client: httpx.Client) -> tuple[str, str]:
    answer = client.post("/v1/models/lstm/sessions", json={"durability": "client"})
    assert (answer.status_code, answer.json()["durability"]) == (201, "client")
    return f"/v1/models/lstm/sessions/{answer.json()['session_id']}", answer.json()["snapshot"]


def test_client_held_state_continues_on_another_server(holders: Replicas, x: np.ndarray, oracle: Oracles):
    old, new = holders.clients
    session, snapshot = hold(old)
    whole = oracle("lstm")(x)
    for i, client in enumerate([old, old, new, new]):
        body = {"inputs": x[i : i + 1].tolist(), "snapshot": snapshot, "position": i}
        answers = [client.post(f"{session}/steps", json=body) for _ in range(2)]
        assert answers[0].content == answers[1].content, "the same request is answered the same"
        document = answers[0].json()
        assert np.array_equal(np.float32(document["outputs"][0]), whole[i])
        assert document["position"] == i + 1
        snapshot = document["snapshot"]
    answer = old.post(f"{session}/steps", json={"inputs": x[4:5].tolist(), "snapshot": snapshot})
    assert code(answer) == "snapshot_invalid", "signed by a key that this server does not know"


def test_a_held_state_as_raw_bytes_and_a_long_chunk(holders: Replicas, x: np.ndarray, oracle: Oracles):
    client = holders.clients[0]
    session, snapshot = hold(client)
    long = np.tile(x, (5, 1))
    sealed, got = base64.b64decode(snapshot), []
    for part in (long[:1], long[1:150], long[150:]):
        headers = {**raw_steps(part), "Unroll-Snapshot-Length": str(len(sealed))}
        answer = client.post(f"{session}/steps", content=sealed + part.tobytes(), headers=headers)
        assert answer.status_code == 200, answer.text
        length = int(answer.headers["Unroll-Snapshot-Length"])
        sealed = answer.content[:length]
        got.append(np.frombuffer(answer.content[length:], "<f4").reshape(-1, 2))
    assert np.array_equal(np.concatenate(got), oracle("lstm")(long))


def test_altered_held_state_is_refused(holders: Replicas, x: np.ndarray):
    client = holders.clients[0]
    session, snapshot = hold(client)
    other, _ = hold(client)
    inputs = x[:1].tolist()
    sealed = base64.b64decode(snapshot)
    for i in range(0, len(sealed), 7):
        damaged = sealed[:i] + bytes([sealed[i] ^ 1]) + sealed[i + 1 :]
        body = {"inputs": inputs, "snapshot": base64.b64encode(damaged).decode()}
        assert code(client.post(f"{session}/steps", json=body)) == "snapshot_invalid", i
    assert code(client.post(f"{other}/steps", json={"inputs": inputs, "snapshot": snapshot})) == "snapshot_invalid"
    assert code(client.post(f"{session}/steps", json={"inputs": inputs, "snapshot": "?"})) == "snapshot_invalid"
    assert code(client.post(f"{session}/steps", json={"inputs": inputs, "snapshot": 7})) == "snapshot_invalid"
    gap = client.post(f"{session}/steps", json={"inputs": inputs, "snapshot": snapshot, "position": 3})
    assert (code(gap), gap.json()["expected"]) == ("position_gap", 0)
    assert code(client.post(f"{session}/steps", json={"inputs": inputs})) == "session_unknown"
    headers = {**RAW, "Unroll-Snapshot-Length": "100000"}
    assert code(client.post(f"{session}/steps", content=b"", headers=headers)) == "malformed_request"


def test_many_held_states_at_once(holders: Replicas, x: np.ndarray, oracle: Oracles, background: Background):
    client = holders.clients[0]
    whole = oracle("lstm")(x[:2])

    def run() -> bool:
        session, snapshot = hold(client)
        for i in range(2):
            body = {"inputs": x[i : i + 1].tolist(), "snapshot": snapshot}
            document = client.post(f"{session}/steps", json=body).json()
            snapshot = document["snapshot"]
            if not np.array_equal(np.float32(document["outputs"][0]), whole[i]):
                return False
        return True

    assert all(future.result() for future in [background(run) for _ in range(40)])


# ── memory sessions that leave their row or the process ──────────────────────────────────────────


def test_sessions_without_a_row_continue(serve: Serve, x: np.ndarray, oracle: Oracles):
    running = serve(session_capacity=2)
    whole = oracle("lstm")(x[:5])
    with httpx.Client(base_url=running.url) as client:
        sessions = [opened(client) for _ in range(9)]
        for i in range(5):
            for session in sessions:
                first = step(client, session, x[i : i + 1], i)
                assert np.array_equal(values(first)[0], whole[i])
            for session in sessions:
                assert step(client, session, x[i : i + 1], i).content == whole[i].tobytes()
        assert len(running.server.sessions.directory.spilled) == 7
        assert client.delete(sessions[0]).json()["position"] == 5
        assert code(step(client, sessions[0], x[:1], 5)) == "session_closed"


def test_host_memory_is_limited(serve: Serve, x: np.ndarray):
    running = serve(session_capacity=1, spill_bytes=2000)
    with httpx.Client(base_url=running.url) as client:
        sessions = [opened(client) for _ in range(6)]
        for session in sessions:
            step(client, session, x[:1])
        answers = [client.get(session) for session in sessions]
        lost = [a for a in answers if a.status_code != 200]
        assert 0 < len(lost) < 6
        assert {code(answer) for answer in lost} == {"session_evicted"}


def test_a_session_without_a_row_expires(serve: Serve, x: np.ndarray):
    clock = ManualClock()
    running = serve(clock, session_capacity=1, idle_timeout=10.0)
    with httpx.Client(base_url=running.url) as client:
        one, two = opened(client), opened(client)
        step(client, one, x[:1])
        clock.advance(6)
        step(client, two, x[:1])
        clock.advance(6)
        assert code(step(client, one, x[:1])) == "session_expired"
        assert step(client, two, x[:1]).status_code == 200


def test_sessions_outlive_the_process_in_a_file(serve: Serve, tmp_path: Path, x: np.ndarray, oracle: Oracles):
    path = tmp_path / "sessions"
    whole = oracle("lstm")(x[:4])
    sessions: list[str] = []
    for i in range(3):
        running = serve(session_capacity=3, state_file=path)
        assert not path.exists(), "the state file must not be read twice"
        with httpx.Client(base_url=running.url) as client:
            sessions = sessions or [opened(client) for _ in range(5)]
            for session in sessions:
                if i:
                    assert step(client, session, x[i - 1 : i], i - 1).content == whole[i - 1].tobytes(), "a retry"
                assert np.array_equal(values(step(client, session, x[i : i + 1], i))[0], whole[i])
        running.stop()
        assert path.exists()


def test_document_describes_client_held_snapshots(replicas: Replicas):
    schemas = json.loads(replicas.any.get("/openapi.json").content)["components"]["schemas"]
    assert "snapshot" in schemas["HeldSession"]["properties"]


def test_memory_session_survives_a_silent_store_during_its_return(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x: np.ndarray
) -> None:
    settings = {"store": f"file://{tmp_path}/store", "durability": "memory", "session_capacity": 1, "spill_bytes": 0}
    running = serve(**settings)
    store = running.server.sessions._store  # type: ignore[attr-defined]
    take, attempts = store.take, []

    async def late(key: Key, token: bytes, attempt: bytes = b"") -> bool:
        taken = await take(key, token, attempt)
        attempts.append(attempt)
        if len(attempts) == 1:
            raise StoreUnavailable("no answer", 0.1)
        return taken

    sessions = "/v1/models/gru/sessions"
    with httpx.Client(base_url=running.url) as client:
        for name in ("first", "second"):  # one row: the other session moves to the store
            client.post(sessions, json={"session_id": name}).raise_for_status()
            client.post(
                f"{sessions}/{name}/steps", content=x[:1].tobytes(), headers=raw_steps(x[:1])
            ).raise_for_status()
        until(lambda: not running.server.sessions.directory.spilled._parking, "the session in the store")
        monkeypatch.setattr(store, "take", late)
        assert client.get(f"{sessions}/first").json()["code"] == "store_unavailable"
        assert client.get(f"{sessions}/first").json()["position"] == 1
    assert len(set(attempts)) == 1


def test_memory_session_used_during_its_spill_leaves_no_record_in_the_store(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x: np.ndarray, oracle: Oracles
) -> None:
    """Also if the store is silent at first: a leftover record would refuse the next one and evict the session."""
    settings = {"store": f"file://{tmp_path}/store", "durability": "memory", "session_capacity": 1, "spill_bytes": 0}
    running = serve(**settings)
    store = running.server.sessions._store  # type: ignore[attr-defined]
    commit, take, may_commit, taken = store.commit, store.take, threading.Event(), []

    async def slow(commits: Sequence[Commit]) -> list[UnrollError | None]:
        await asyncio.to_thread(may_commit.wait)
        return await commit(commits)

    async def silent_at_first(key: Key, token: bytes, attempt: bytes = b"") -> bool:
        taken.append(key[1])
        if taken.count(key[1]) == 1:
            raise StoreUnavailable("no answer", 0.01)
        return await take(key, token, attempt)

    monkeypatch.setattr(store, "commit", slow)
    monkeypatch.setattr(store, "take", silent_at_first)
    sessions = "/v1/models/lstm/sessions"
    with httpx.Client(base_url=running.url) as client:
        for name in ("first", "second"):
            client.post(sessions, json={"session_id": name}).raise_for_status()
        replies = []
        for i, name in enumerate(("first", "second", "first", "second", "first")):  # there is a row for one
            if i == 2:
                may_commit.set()
                until(lambda: not running.server.sessions.directory.spilled._tasks, "the other in the store")
            step = x[len(replies) // 2 : len(replies) // 2 + 1]
            reply = client.post(f"{sessions}/{name}/steps", content=step.tobytes(), headers=raw_steps(step))
            assert reply.status_code == 200, reply.text
            replies.append(reply.content)
    assert b"".join(replies[::2]) == oracle("lstm")(x[:3]).tobytes()


def test_a_session_that_gets_no_row_after_its_commit_is_not_left_in_the_store(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x: np.ndarray, background: Background
) -> None:
    running = serve(store=f"file://{tmp_path}/store", session_capacity=1)
    store = running.server.sessions._store  # type: ignore[attr-defined]
    commit, committing, may_commit = store.commit, threading.Event(), threading.Event()

    async def slow(commits: Sequence[Commit]) -> list[UnrollError | None]:
        if commits[0].key[1] == "second":
            committing.set()
            await asyncio.to_thread(may_commit.wait)
        return await commit(commits)

    monkeypatch.setattr(store, "commit", slow)
    with httpx.Client(base_url=running.url) as client:
        first = opened(client, session_id="first")
        opening = background(client.post, "/v1/models/lstm/sessions", json={"session_id": "second"})
        assert committing.wait(PATIENCE)
        with running.holding("lstm") as held:
            stepping = background(step, client, first, x[:1])
            held.wait()
            may_commit.set()
            assert code(opening.result()) == "capacity_exhausted"
        assert stepping.result().status_code == 200
        opened(client, session_id="second")
