"""Every error code over HTTP: its status, its format, and its advice to the client."""

import ast
import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from importlib import import_module

import httpx
import numpy as np
import pytest
from problems import GOOD, assert_problem
from serving import RAW, Running, Serve
from waiting import until

from unroll.service.core import errors
from unroll.service.core.clock import ManualClock
from unroll.service.engine.engine import Rows, Tensors

Background = Callable[..., Future]

STEP = np.float32(GOOD).tobytes()


class Client(httpx.Client):
    """A client with the common actions of these tests."""

    def open(self, model: str = "lstm", **body: object) -> str:
        answer = self.post(f"/v1/models/{model}/sessions", json=body).raise_for_status()
        return f"/v1/models/{model}/sessions/{answer.json()['session_id']}"

    def step(self, session: str, content: bytes = STEP, **headers: str) -> httpx.Response:
        return self.post(f"{session}/steps", content=content, headers={**RAW, **headers})


@pytest.fixture
def start(serve: Serve) -> Iterator[Callable[..., tuple[Running, Client]]]:
    """A server with these settings, and its client."""
    clients: list[Client] = []

    def start(clock: ManualClock | None = None, **settings: object) -> tuple[Running, Client]:
        running = serve(clock, **settings)
        clients.append(Client(base_url=running.url))
        return running, clients[-1]

    yield start
    for client in clients:
        client.close()


Start = Callable[..., tuple[Running, Client]]

#: Every code and the test that covers it.
MET = {
    "malformed_request": "test_native_inputs.test_malformed",
    "body_too_large": "test_native_inputs.test_a_body_too_large_by_its_declared_length",
    "unsupported_media_type": "test_native_inputs.test_other_media_types",
    "invalid_shape": "test_native_inputs.test_wrong_values",
    "invalid_dtype": "test_native_inputs.test_wrong_values",
    "non_finite_input": "test_native_inputs.test_raw_that_is_not_finite",
    "input_out_of_range": "test_native_inputs.test_wrong_tokens",
    "non_finite_output": "test_native_inputs.test_an_answer_that_is_not_finite",
    "model_unknown": "test_native_inputs.test_paths",
    "model_unavailable": "test_refused_bundles.test_request_for_a_refused_version_gets_the_reason",
    "unauthenticated": "test_tenants.test_the_scope_of_every_route",
    "forbidden": "test_tenants.test_the_scope_of_every_route",
    "host_refused": "test_tenants.test_foreign_host_name_is_refused",
    "origin_refused": "test_tenants.test_a_page_of_another_origin_can_change_nothing",
    "quota_exceeded": "test_tenant_quotas.test_the_steps_of_a_tenant",
    "session_unknown": "test_native_inputs.test_paths",
    "snapshot_invalid": "test_native_sessions.test_a_damaged_snapshot_is_refused_and_changes_nothing",
    "map_invalid": "test_session_rollout.test_a_map_that_does_not_fit_the_model",
    "not_streamable": "test_native_sessions.test_a_model_that_needs_whole_sequences",
    "model_changed": "test_native_sessions.test_session_is_found_by_its_models_name_without_a_version",
    "session_closed": "test_native_sessions.test_close_and_reopen",
    "durability_unavailable": "test_durable.test_requests_that_need_a_store_are_refused_without_one",
    "store_unavailable": "test_durable.test_store_outage_is_reported",
    "session_contended": "test_durable.test_steps_from_everywhere_at_once_each_count",
    "session_exists": "test_native_errors.test_opening_an_open_session_is_refused",
    "session_expired": "test_native_errors.test_idle_expiry",
    "session_evicted": "test_native_errors.test_eviction",
    "capacity_exhausted": "test_native_errors.test_capacity",
    "keys_unavailable": "test_jwts.test_unreachable_provider_gives_keys_unavailable",
    "version_unavailable": "test_rollout.test_session_of_a_version_not_yet_present_is_retryable",
    "draining": "test_drain.test_while_load_balancers_notice",
    "queue_full": "test_native_errors.test_queue_full",
    "too_many_connections": "test_connection_limits.test_beyond_the_limit_probes_are_answered_and_others_refused",
    "deadline_unreachable": "test_native_errors.test_a_deadline_that_cannot_be_met",
    "deadline_exceeded": "test_native_errors.test_a_deadline_that_passes",
    "engine_failed": "test_native_errors.test_the_engine_fails",
    "position_gap": "test_positions.test_a_gap",
    "position_too_old": "test_positions.test_too_old",
    "payload_mismatch": "test_positions.test_another_payload",
    "cancelled": "test_positions.test_retry_of_a_chunk_after_its_client_disconnects",  # never reached
}


def test_every_code_is_covered() -> None:
    tree = ast.parse(inspect.getsource(errors))
    codes = {
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    assert codes == MET.keys()
    for test in MET.values():
        module, _, name = test.partition(".")
        assert callable(getattr(import_module(module), name))


def test_opening_an_open_session_is_refused(start: Start) -> None:
    _, client = start()
    session = client.open(session_id="s")
    client.step(session)
    before = client.get(f"{session}/state").content
    answer = client.post("/v1/models/lstm/sessions", json={"session_id": "s"})
    assert_problem(answer, 409, "session_exists")
    assert answer.json()["position"] == 1
    assert client.get(f"{session}/state").content == before


def test_opening_a_session_open_on_another_version_is_refused(start: Start) -> None:
    _, client = start()
    client.open("gru:1", session_id="s")
    assert_problem(client.post("/v1/models/gru/sessions", json={"session_id": "s"}), 409, "session_exists")


# ── how sessions are lost ────────────────────────────────────────────────────────────────────────


def assert_gone(client: Client, session: str, status: int, code: str) -> None:
    for answer in (
        client.step(session),
        client.step(session, **{"Unroll-Position": "1"}),
        client.post(f"{session}/steps", json={"inputs": GOOD}),
        client.get(session),
        client.get(f"{session}/state"),
        client.put(f"{session}/state", content=bytes(100), headers=RAW),
        client.post(f"{session}/fork"),
        client.delete(session),
    ):
        if answer.request.method == "PUT" and answer.status_code == 422:
            continue  # the order of the two errors is not specified
        assert_problem(answer, status, code)


def test_idle_expiry(start: Start) -> None:
    clock = ManualClock(1e6)
    _, client = start(clock, idle_timeout=10, tombstone_life=100)
    session, kept = client.open(), client.open()
    client.step(session)
    clock.advance(9)
    client.step(kept)
    assert client.get(session).status_code == 200, "looking does not count as use"
    clock.advance(1)
    assert_gone(client, session, 410, "session_expired")
    assert client.step(kept).status_code == 200
    assert client.get(kept).json()["position"] == 2
    clock.advance(99)
    assert_gone(client, session, 410, "session_expired")
    clock.advance(1)
    assert_gone(client, session, 404, "session_unknown")


def test_expired_id_can_be_reopened(start: Start) -> None:
    clock = ManualClock()
    _, client = start(clock, idle_timeout=10)
    session = client.open(session_id="s")
    first = client.step(session).content
    clock.advance(10)
    assert client.open(session_id="s") == session
    assert client.get(session).json()["position"] == 0
    assert client.step(session).content == first


def test_sessions_never_expire_without_an_idle_timeout(start: Start) -> None:
    clock = ManualClock()
    _, client = start(clock, idle_timeout=0)
    session = client.open()
    assert client.get(session).json()["idle_timeout"] is None
    clock.advance(1e9)
    assert client.step(session).status_code == 200


def test_clock_may_stop_or_jump(start: Start) -> None:
    clock = ManualClock(-1e9)
    _, client = start(clock, idle_timeout=10)
    session = client.open()
    for _ in range(3):
        assert client.step(session).status_code == 200
    clock.advance(1e12)
    assert_gone(client, session, 410, "session_expired")


def test_eviction(start: Start) -> None:
    _, client = start(session_capacity=3, spill_bytes=0)
    sessions = [client.open() for _ in range(3)]
    client.step(sessions[0])  # now the second is the least recently used
    newest = client.open()
    assert_gone(client, sessions[1], 410, "session_evicted")
    for session in (sessions[0], sessions[2], newest):
        assert client.step(session).status_code == 200


def test_a_fork_may_evict_but_never_its_origin(start: Start) -> None:
    _, client = start(session_capacity=2, spill_bytes=0)
    origin, other = client.open(), client.open()
    client.step(origin)
    client.step(other)
    forked = client.post(f"{origin}/fork")  # the origin is the least recently used, but it is busy
    assert forked.status_code == 201
    assert_gone(client, other, 410, "session_evicted")
    assert client.get(origin).json()["position"] == 1


def test_a_closed_session_makes_room(start: Start) -> None:
    _, client = start(session_capacity=2, spill_bytes=0)
    first, second = client.open(), client.open()
    client.delete(second)
    client.open()
    assert client.get(first).status_code == 200


# ── no room, no time ─────────────────────────────────────────────────────────────────────────────


def assert_try_again(answer: httpx.Response, code: str) -> None:
    assert_problem(answer, 503, code)
    assert int(answer.headers["retry-after"]) >= 1


def test_capacity(start: Start, background: Background) -> None:
    running, client = start(session_capacity=1, spill_bytes=0)
    session = client.open()
    with running.holding("lstm") as held:
        stepping = background(client.step, session)
        held.wait()
        assert_try_again(client.post("/v1/models/lstm/sessions"), "capacity_exhausted")
    assert stepping.result().status_code == 200
    assert client.step(session).status_code == 200
    client.open()
    assert_gone(client, session, 410, "session_evicted")


def test_queue_full(start: Start, background: Background) -> None:
    running, client = start(max_queue=2)
    sessions = [client.open() for _ in range(3)]
    scheduler = running.model("lstm").scheduler
    with running.holding("lstm") as held:
        accepted = [background(client.step, sessions[0])]
        held.wait()
        accepted.append(background(client.step, sessions[1]))
        until(lambda: scheduler.in_flight == 2)
        assert_try_again(client.step(sessions[2]), "queue_full")
        answer = client.post("/v1/models/lstm/sequences", json={"inputs": [GOOD]})
        assert_try_again(answer, "queue_full")
    assert [answer.result().status_code for answer in accepted] == [200, 200]
    assert client.get(sessions[2]).json()["position"] == 0
    assert client.step(sessions[2]).status_code == 200


def test_a_deadline_that_cannot_be_met(start: Start, background: Background) -> None:
    running, client = start(ManualClock())
    session = client.open()
    with running.holding("lstm") as held:
        stepping = background(client.step, session)
        held.wait()
        late = {"Unroll-Timeout-Ms": "0"}
        assert_try_again(client.step(client.open(), **late), "deadline_unreachable")
        assert_try_again(client.step(session, **late), "deadline_unreachable")
    assert stepping.result().status_code == 200
    assert client.get(session).json()["position"] == 1


def test_a_deadline_that_passes(start: Start, background: Background) -> None:
    clock = ManualClock()
    running, client = start(clock)
    session = client.open()
    scheduler = running.model("lstm").scheduler
    with running.holding("lstm") as held:
        first = background(client.step, session)
        held.wait()
        second = background(client.step, session, **{"Unroll-Timeout-Ms": "500"})
        until(lambda: scheduler.in_flight == 2)
        clock.advance(0.5)
    assert first.result().status_code == 200
    assert_problem(second.result(), 504, "deadline_exceeded")
    assert client.get(session).json()["position"] == 1
    assert client.step(session, **{"Unroll-Position": "1"}).status_code == 200


def test_no_time_at_all(start: Start) -> None:
    _, client = start(ManualClock())
    session = client.open()
    assert_problem(client.step(session, **{"Unroll-Timeout-Ms": "0"}), 504, "deadline_exceeded")
    assert client.get(session).json()["position"] == 0


# ── the engine ───────────────────────────────────────────────────────────────────────────────────


class Broken:
    """An engine that fails rows with 13 as their first value."""

    def __init__(self, engine: object) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def run(self, rows: Rows) -> tuple[Tensors, dict[int, errors.UnrollError]]:
        bad = {i: errors.EngineFailed("broken") for i in range(len(rows.lens)) if rows.inputs[0][i, 0, 0] == 13}
        return ((np.zeros((1, 1, 2)),), bad) if bad else self._engine.run(rows)  # type: ignore[attr-defined]


def test_the_engine_fails(start: Start) -> None:
    running, client = start()
    session = client.open()
    client.step(session)
    before = client.get(f"{session}/state").content
    running.model("lstm").loop.engine = Broken(running.model("lstm").engine)  # type: ignore[assignment]
    answer = client.step(session, np.float32([[13, 0, 0]]).tobytes())
    assert_problem(answer, 500, "engine_failed")
    assert client.get(f"{session}/state").content == before
    assert client.step(session, **{"Unroll-Position": "1"}).status_code == 200
