"""Rollouts feed outputs back as inputs, on a fork or on the session; a step-by-step client gives the expectation."""

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from rollouts import by_hand, events, roll, sample
from serving import Running, Serve, SlowEngine, metric
from waiting import until
from websockets.sync.client import connect

from unroll.service.settings import Settings

X = [[0.5, -1.0, 0.25], [1.0, 0.0, -0.5]]
#: The map for models of three inputs and two outputs: one value is scaled, one constant, one unchanged.
COLUMNS = {
    "kind": "columns",
    "columns": [{"from": 1}, {"from": 0, "scale": -0.7, "offset": 0.1}, {"constant": 0.25}],
}


def columns(outputs: list[float], position: int) -> list[float]:
    scaled = np.float32(float(np.float32(outputs[0])) * -0.7 + 0.1)
    return [outputs[1], float(str(scaled)), 0.25]  # the shortest digits, as in JSON


def opened(client: httpx.Client, model: str, inputs: Any, **body: Any) -> tuple[str, Any]:
    """Open a session and run these steps; return it and the outputs of the last step."""
    answer = client.post(f"/v1/models/{model}/sessions", json=body)
    assert answer.status_code == 201, answer.text
    session = f"/v1/models/{model}/sessions/{answer.json()['session_id']}"
    answer = client.post(f"{session}/steps", json={"inputs": inputs})
    assert answer.status_code == 200, answer.text
    return session, answer.json()["outputs"][-1]


def position_of(client: httpx.Client, session: str) -> int:
    return client.get(session).json()["position"]


def raw_rollout(session: str, **body: Any) -> bytes:
    content = json.dumps(body).encode()
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return f"POST {session}/rollout HTTP/1.1\r\n{head}".encode() + content


def pairs(steps: list[dict]) -> list[tuple]:
    """Return (inputs, outputs) of each time step."""
    return [pair for step in steps for pair in zip(step["inputs"], step["outputs"], strict=True)]


@pytest.fixture(scope="module")
def with_store(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("store")
    keys = ("a key of the tests",)
    running = Running(Settings(repository=few, store=f"file://{folder}", snapshot_keys=keys))  # type: ignore[arg-type]
    yield running
    running.stop()


@pytest.fixture
def store_client(with_store: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=with_store.url) as client:
        yield client


# ── equality with a step-by-step client ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("model", ["lstm", "gru:1"])
@pytest.mark.parametrize("on", ["fork", "session"])
def test_rollout_equals_a_step_by_step_client(client: httpx.Client, model: str, on: str) -> None:
    session, last = opened(client, model, X)
    twin, _ = opened(client, model, X)
    steps, end = roll(client, session, steps=9, map=COLUMNS, on=on, outputs=last, position=2)
    assert pairs(steps) == by_hand(client, twin, columns, last, 2, 9)
    assert [step["position"] for step in steps] == list(range(3, 12))
    assert end == {"position": 11, "reply_kept": True}
    assert position_of(client, session) == (2 if on == "fork" else 11)
    following = {"inputs": X[:1]}
    if on == "session":
        assert (
            client.post(f"{session}/steps", json=following).json()
            == client.post(f"{twin}/steps", json=following).json()
        )


def test_given_time_steps_come_first(client: httpx.Client) -> None:
    session, _ = opened(client, "lstm", X)
    twin, last = opened(client, "lstm", X * 2)
    steps, end = roll(client, session, steps=5, map=COLUMNS, inputs=X)
    assert [step["position"] for step in steps] == [4, 5, 6, 7, 8, 9]
    assert steps[0]["inputs"] == X
    assert pairs(steps[1:]) == by_hand(client, twin, columns, last, 4, 5)
    assert end["position"] == 9


def test_a_prompt_longer_than_a_piece_runs_in_pieces(client: httpx.Client) -> None:
    prompt = [X[i % 2] for i in range(150)]
    session, _ = opened(client, "lstm", X)
    twin, last = opened(client, "lstm", X + prompt)
    steps, _ = roll(client, session, steps=3, map=COLUMNS, inputs=prompt, send="outputs", steps_per_event=4096)
    (step,) = steps
    assert step.keys() == {"position", "outputs"}
    assert step["position"] == 155
    assert step["outputs"][149] == last
    assert step["outputs"][150:] == [outputs for _, outputs in by_hand(client, twin, columns, last, 152, 3)]


def test_many_steps_in_an_event_are_several_events_of_no_more_than_is_encoded_at_once(client: httpx.Client) -> None:
    session, _ = opened(client, "lstm", X)
    body = {"steps": 1, "map": COLUMNS, "inputs": X * 1000, "on": "session", "position": 2, "steps_per_event": 4096}
    first, again = [roll(client, session, **body)[0] for _ in range(2)]
    for events_of_it in (first, again):
        assert [step["position"] for step in events_of_it[1:]] == [2003]
        assert 1638 <= len(events_of_it[0]["inputs"]) < 1638 + 64  # of 5 values each
    assert pairs(first) == pairs(again)


def test_rollout_starts_from_the_outputs_of_the_last_step(client: httpx.Client) -> None:
    session, last = opened(client, "lstm", X)
    known, _ = roll(client, session, steps=4, map=COLUMNS)
    said, _ = roll(client, session, steps=4, map=COLUMNS, outputs=last)
    assert known == said
    forked = client.post(f"{session}/fork").json()["session_id"]
    answer = client.post(f"/v1/models/lstm/sessions/{forked}/rollout", json={"steps": 4, "map": COLUMNS})
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_request")
    assert "send them as 'outputs'" in answer.json()["detail"]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.3}, {"top_k": 3}, {"temperature": 5.0, "top_k": 9}])
def test_sampled_tokens_are_those_of_the_documented_generator(client: httpx.Client, options: dict) -> None:
    session, last = opened(client, "tokens", [3, 1])
    twin, _ = opened(client, "tokens", [3, 1])
    found = {}
    for seed in (0, 2**53 - 1):
        drawn = {"seed": seed, **options}

        def feed(logits: list[float], position: int, drawn: dict = drawn) -> int:
            return sample(np.float32(logits), position, **drawn)

        steps, _ = roll(client, session, steps=12, map={"kind": "sample", **drawn}, on="fork")
        found[seed] = pairs(steps)
        copy = client.post(f"{twin}/fork").json()["session_id"]
        assert found[seed] == by_hand(client, f"/v1/models/tokens/sessions/{copy}", feed, last, 2, 12)
    assert found[0] != found[2**53 - 1]


def test_rollout_continues_the_random_draws_of_the_one_before(client: httpx.Client) -> None:
    session, last = opened(client, "tokens", [3, 1])
    sampled = {"kind": "sample", "seed": 5, "temperature": 2.0}
    whole, _ = roll(client, session, steps=8, map=sampled)
    first, _ = roll(client, session, steps=3, map=sampled, on="session", outputs=last)
    rest, _ = roll(client, session, steps=5, map=sampled)
    assert pairs(first) + pairs(rest) == pairs(whole)


def test_argmax_and_values_that_the_request_gives(client: httpx.Client) -> None:
    session, last = opened(client, "tokens", [3, 1])
    twin, _ = opened(client, "tokens", [3, 1])
    steps, _ = roll(client, session, steps=6, map={"kind": "argmax", "output": "y"}, steps_per_event=4)
    assert [len(step["inputs"]) for step in steps] == [4, 2]
    assert pairs(steps) == by_hand(client, twin, lambda logits, _: int(np.argmax(logits)), last, 2, 6)
    steps, _ = roll(client, session, steps=3, map={"kind": "columns", "columns": [{"future": [7, 8, 9]}]})
    assert [step["inputs"] for step in steps] == [[7], [8], [9]]


def test_several_inputs_have_a_map_each(client: httpx.Client) -> None:
    given = {"a": [[0.5, 1.0]], "b": [[1.0, 0.0, -1.0]]}
    answer = client.post("/v1/models/two/sessions", json={})
    session = f"/v1/models/two/sessions/{answer.json()['session_id']}"
    known = {"kind": "columns", "output": "level", "columns": [{"from": 0}, {"future": [1, 2]}, {"constant": 0}]}
    steps, _ = roll(
        client, session, steps=2, map={"a": {"kind": "identity", "output": "slope"}, "b": known}, inputs=given
    )
    assert steps[1]["inputs"]["a"] == steps[0]["outputs"]["slope"]
    assert steps[1]["inputs"]["b"] == [[steps[0]["outputs"]["level"][0][0], 1, 0]]
    assert steps[2]["inputs"]["b"] == [[steps[1]["outputs"]["level"][0][0], 2, 0]]


def test_an_output_without_a_time_axis(client: httpx.Client) -> None:
    answer = client.post("/v1/models/last/sessions", json={})
    session = f"/v1/models/last/sessions/{answer.json()['session_id']}"
    last = client.post(f"{session}/steps", json={"inputs": X}).json()["outputs"]
    twin = client.post(f"{session}/fork").json()["session_id"]
    steps, _ = roll(client, session, steps=4, map=COLUMNS)
    for step in steps:
        inputs = [columns(last, 0)]
        assert step["inputs"] == inputs
        last = client.post(f"/v1/models/last/sessions/{twin}/steps", json={"inputs": inputs}).json()["outputs"]
        assert step["outputs"] == last
    for body in ({"on": "session", "outputs": last}, {"steps_per_event": 2}):
        answer = client.post(f"{session}/rollout", json={"steps": 4, "map": COLUMNS, **body})
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed_request")


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_rollouts_share_batches_with_each_other_and_with_steps(
    serve: Serve, background: Callable[..., Future], name: str
) -> None:
    """Eight rollouts and eight stepping clients each get the same results as when run separately."""
    running = serve()
    with httpx.Client(base_url=running.url, timeout=60) as client:
        sessions = [opened(client, name, [[i / 7, 1.0, -0.5]]) for i in range(8)]
        twins = [opened(client, name, [[i / 7, 1.0, -0.5]])[0] for i in range(8)]
        alone = [roll(client, session, steps=20, map=COLUMNS)[0] for session, _ in sessions]
        scheduler = running.model(name).scheduler
        batches = scheduler.counters.batches
        with running.holding(name):  # all are ready when the first batch ends
            stepping = [background(by_hand, client, session, columns, last, 1, 20) for session, last in sessions]
            rolling = [
                background(roll, client, twin, steps=20, map=COLUMNS, on="session", outputs=last)
                for twin, (_, last) in zip(twins, sessions, strict=True)
            ]
            until(lambda: scheduler.in_flight == 16)
        assert [future.result()[0] for future in rolling] == alone
        assert [future.result() for future in stepping] == [pairs(steps) for steps in alone]
    assert scheduler.counters.batches - batches < 16 * 20


# ── on the session: applied once, as a whole ─────────────────────────────────────────────────────


@pytest.mark.parametrize("durability", ["memory", "stored"])
def test_a_retry_gets_the_same_and_applies_nothing(store_client: httpx.Client, durability: str) -> None:
    client = store_client
    session, last = opened(client, "lstm", X, durability=durability)
    body = {"steps": 6, "map": COLUMNS, "on": "session", "outputs": last, "position": 2}
    first = roll(client, session, **body)
    assert roll(client, session, **body) == first
    assert position_of(client, session) == 8
    for other in ({"steps": 5}, {"outputs": [1.0, 2.0]}, {"map": {**COLUMNS, "columns": [{"constant": 1}] * 3}}):
        answer = client.post(f"{session}/rollout", json={**body, **other})
        assert (answer.status_code, answer.json()["code"]) == (409, "payload_mismatch")
    answer = client.post(f"{session}/steps", json={"inputs": X[:1], "position": 2})
    assert (answer.status_code, answer.json()["code"]) == (409, "payload_mismatch")
    for position, code in ((9, "position_gap"), (1, "position_too_old")):
        answer = client.post(f"{session}/rollout", json={**body, "position": position})
        assert (answer.status_code, answer.json()["code"], answer.json()["expected"]) == (409, code, 8)
    client.post(f"{session}/steps", json={"inputs": X[:1]})
    assert client.post(f"{session}/rollout", json=body).json()["code"] == "position_too_old"


def test_other_clients_are_answered_during_a_retried_rollout(server: Running) -> None:
    steps = {"op": "steps", "handle": 1, "position": 0, "inputs": X}
    wanted = {"steps": 1000, "map": COLUMNS, "on": "session", "inputs": X, "position": 0, "values": "json"}
    rollout = json.dumps({"op": "rollout", "handle": 0, **wanted})
    with connect(f"ws{server.url[4:]}/v1/models/lstm/stream") as stream:
        stream.send(json.dumps({"op": "open", "sessions": [{"handle": 0}, {"handle": 1}]}))
        stream.recv()
        stream.send(rollout)
        first = [json.loads(stream.recv()) for _ in range(1002)]
        stream.send(rollout)
        stream.send(json.dumps(steps))
        again = [json.loads(stream.recv()) for _ in range(1003)]
    (at,) = [index for index, message in enumerate(again) if message["op"] == "outputs"]
    del again[at]
    assert again == first
    assert first[-1] == {"op": "rolled", "handle": 0, "position": 1002, "reply_kept": True}
    assert at < 1000


def test_the_next_server_knows_a_rollout_that_was_committed(serve: Serve, tmp_path: Path) -> None:
    running = serve(store=tmp_path.as_uri())
    with httpx.Client(base_url=running.url) as client:
        session, last = opened(client, "lstm", X)
        body = {"steps": 6, "map": COLUMNS, "on": "session", "outputs": last, "position": 2}
        first = roll(client, session, **body)
    running.stop()
    with httpx.Client(base_url=serve(store=tmp_path.as_uri()).url) as client:
        assert roll(client, session, **body) == first
        steps, _ = roll(client, session, steps=2, map=COLUMNS)
        assert pairs(steps)[0][0] == columns(first[0][-1]["outputs"][0], 8)
        assert position_of(client, session) == 8


def test_a_rollout_of_one_step_is_retried_as_such(client: httpx.Client) -> None:
    session, last = opened(client, "lstm", X)
    body = {"steps": 1, "map": COLUMNS, "on": "session", "outputs": last, "position": 2}
    client.post(f"{session}/steps", json={"inputs": X[:1], "position": 2})
    assert client.post(f"{session}/rollout", json=body).json()["code"] == "payload_mismatch"
    body["position"] = 3
    first = roll(client, session, **body)
    assert roll(client, session, **body) == first
    assert position_of(client, session) == 4


def test_steps_wait_for_a_rollout_on_the_session(server: Running, client: httpx.Client, background: Callable) -> None:
    session, last = opened(client, "lstm", X)
    twin, _ = opened(client, "lstm", X)
    with server.holding("lstm") as held:
        rolling = background(roll, client, session, steps=5, map=COLUMNS, on="session", outputs=last)
        held.wait()
        after = background(client.post, f"{session}/steps", json={"inputs": X[:1], "position": 7})
        retry = background(roll, client, session, steps=5, map=COLUMNS, on="session", outputs=last, position=2)
        scheduler = server.model("lstm").scheduler
        found = scheduler.sessions.find_detached(session.rpartition("/")[2], 0.0)
        until(lambda: found.expected == 8 and len(found.active.listeners) == 2)
    by_hand(client, twin, columns, last, 2, 5)
    assert rolling.result() == retry.result()
    assert after.result().json() == client.post(f"{twin}/steps", json={"inputs": X[:1]}).json()


# ── how a rollout ends ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("on", ["fork", "session"])
def test_a_client_that_goes_away_ends_its_rollout(server: Running, client: httpx.Client, on: str) -> None:
    session, last = opened(client, "lstm", X)
    before = client.get(f"{session}/state").content
    scheduler = server.model("lstm").scheduler
    run = scheduler.counters.rollout_steps
    request = raw_rollout(session, steps=4096, map=COLUMNS, on=on, outputs=last)
    with SlowEngine(server.model("lstm").loop, 0.005):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request)
            assert connection.recv(10_000).startswith(b"HTTP/1.1 200")
        until(lambda: not len(scheduler.rollouts))
    assert 0 < scheduler.counters.rollout_steps - run < 4096
    assert client.get(f"{session}/state").content == before
    until(lambda: metric(client.get("/metrics").text, "unroll_requests_total", route="v1/rollout", status="499"))


def test_a_client_that_goes_away_before_the_first_event_ends_its_rollout(server: Running, client: httpx.Client) -> None:
    session, last = opened(client, "lstm", X)
    scheduler = server.model("lstm").scheduler
    with SlowEngine(server.model("lstm").loop, 0.005):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            members: dict[str, Any] = {"map": COLUMNS, "on": "session", "outputs": last, "steps_per_event": 400}
            connection.sendall(raw_rollout(session, steps=400, **members))
            until(lambda: len(scheduler.rollouts))
        until(lambda: not len(scheduler.rollouts))
    assert position_of(client, session) == 2


def test_closing_the_session_ends_its_rollout(server: Running, client: httpx.Client) -> None:
    session, last = opened(client, "lstm", X)
    body = {"steps": 4096, "map": COLUMNS, "on": "session", "outputs": last}
    slow = SlowEngine(server.model("lstm").loop, 0.005)
    with slow, client.stream("POST", f"{session}/rollout", json=body) as answer:
        found = events(answer.iter_lines())
        assert next(found)[0] == "steps"
        assert httpx.delete(f"{server.url}{session}").status_code == 200
        *_, (name, problem) = found
    assert (name, problem["code"], problem["status"]) == ("error", "session_closed", 410)


def test_invalid_fed_back_value_ends_the_rollout(client: httpx.Client) -> None:
    session, _ = opened(client, "lstm", X)
    growing = {"kind": "columns", "columns": [{"from": 0, "scale": 1e39, "offset": 1e39}] * 3}
    with client.stream("POST", f"{session}/rollout", json={"steps": 9, "map": growing, "inputs": X}) as answer:
        *steps, (name, problem) = events(answer.iter_lines())
    assert [step["position"] for _, step in steps] == [4]
    assert (name, problem["code"]) == ("error", "non_finite_input")
    assert position_of(client, session) == 2


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "mapped", "code", "says"),
    [
        (
            "lstm",
            {"kind": "identity"},
            "map_invalid",
            "'y' has the shape (2,) of float32, and the input 'x' takes (3,)",
        ),
        ("lstm", {"kind": "argmax"}, "map_invalid", "argmax needs an input of one integer"),
        ("lstm", {"kind": "identity", "output": "z"}, "map_invalid", "the model's outputs are ['y']"),
        (
            "lstm",
            {"kind": "columns", "columns": [{"from": 0}]},
            "map_invalid",
            "1 columns; the input 'x' takes 3 values",
        ),
        ("lstm", {"kind": "columns", "columns": [{"from": 2}] * 3}, "map_invalid", "column 0 cannot be value 2"),
        ("lstm", {"kind": "columns", "columns": [{"future": [1]}] * 3}, "invalid_shape", "1 future values for 2 steps"),
        ("lstm", {"kind": "columns", "columns": [{"constant": 10**400}] * 3}, "non_finite_input", "too large"),
        ("lstm", {"a": {"kind": "identity"}}, "map_invalid", "the map is for ['a']; the model's inputs are ['x']"),
        ("two", {"kind": "identity", "output": "slope"}, "map_invalid", "the model's inputs are ['a', 'b']"),
        ("tokens", {"kind": "identity"}, "map_invalid", "(11,) of float32, and the input 'token' takes () of int64"),
        ("tokens", {"kind": "columns", "columns": [{"from": 0}]}, "map_invalid", "column 0 cannot be value 0"),
        ("tokens", {"kind": "columns", "columns": [{"constant": 0.5}]}, "invalid_dtype", "type int64 only"),
        ("tokens", {"kind": "columns", "columns": [{"constant": 11}]}, "input_out_of_range", "0 … 10"),
        ("tokens", {"kind": "sample"}, "malformed_request", "seed"),
        ("tokens", {"kind": "sample", "seed": 2**53}, "malformed_request", "seed"),
        ("tokens", {"kind": "sample", "seed": 1, "temperature": 0}, "malformed_request", "temperature"),
        ("tokens", {"kind": "beam"}, "malformed_request", "beam"),
    ],
)
def test_a_map_that_does_not_fit_the_model(
    client: httpx.Client, model: str, mapped: dict, code: str, says: str
) -> None:
    given = {"tokens": [1], "two": {"a": [[0.0, 0.0]], "b": [[0.0, 0.0, 0.0]]}}.get(model, X[:1])
    answer = client.post(f"/v1/models/{model}/sessions", json={})
    session = f"/v1/models/{model}/sessions/{answer.json()['session_id']}"
    answer = client.post(f"{session}/rollout", json={"steps": 2, "map": mapped, "inputs": given})
    if answer.status_code == 200:  # the second step is the first to use a value of the map
        ((_, _), (name, problem)) = events(iter(answer.text.splitlines()))
        assert name == "error"
    else:
        problem = answer.json()
        assert problem["status"] == (400 if code == "malformed_request" else 422)
    assert problem["code"] == code
    assert says in problem["detail"]


def test_the_limits_of_a_rollout(serve: Serve) -> None:
    running = serve(max_rollout_steps=10, max_batch=2)
    with httpx.Client(base_url=running.url) as client:
        session, last = opened(client, "lstm", X)
        answer = client.post(f"{session}/rollout", json={"steps": 11, "map": COLUMNS})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_shape")
        assert "--max-rollout-steps" in answer.json()["detail"]
        for body in ({"on": "session"}, {"outputs": last, "inputs": X}, {"steps": 0}, {"seed": 1}):
            answer = client.post(f"{session}/rollout", json={"steps": 3, "map": COLUMNS, **body})
            assert (answer.status_code, answer.json()["code"]) == (400, "malformed_request"), body
        for position, code in ((3, "position_gap"), (1, "position_too_old")):
            answer = client.post(f"{session}/rollout", json={"steps": 3, "map": COLUMNS, "position": position})
            assert (answer.status_code, answer.json()["code"], answer.json()["expected"]) == (409, code, 2)
        with running.holding("lstm") as held, httpx.Client(base_url=running.url) as other:
            waiting = socket.create_connection(("127.0.0.1", running.port))
            waiting.sendall(raw_rollout(session, steps=3, map=COLUMNS, inputs=X[:1], on="session"))
            held.wait()
            assert metric(other.get("/metrics").text, "unroll_rollouts") == 1
            answer = other.post(f"{session}/rollout", json={"steps": 3, "map": COLUMNS, "inputs": X, "on": "session"})
            assert (answer.status_code, answer.json()["code"]) == (503, "queue_full")
        waiting.close()
        until(lambda: not len(running.model("lstm").scheduler.rollouts))
    assert running.model("lstm").scheduler.counters.rollout_steps >= 1


def test_the_position_may_be_a_header(client: httpx.Client) -> None:
    session, _ = opened(client, "lstm", X)
    body = {"steps": 2, "map": COLUMNS}
    for header, position, code in (
        ("1", None, "position_too_old"),
        ("2", 3, "malformed_request"),
        ("x", 2, "malformed_request"),
    ):
        answer = client.post(
            f"{session}/rollout", json={**body, "position": position}, headers={"Unroll-Position": header}
        )
        assert answer.json()["code"] == code
    assert client.post(f"{session}/rollout", json=body, headers={"Unroll-Position": "2"}).status_code == 200


def test_rollout_on_an_unknown_session_is_refused(client: httpx.Client) -> None:
    for on in ("fork", "session"):
        body = {"steps": 2, "map": COLUMNS, "inputs": X, "on": on}
        answer = client.post("/v1/models/lstm/sessions/nobody/rollout", json=body)
        assert (answer.status_code, answer.json()["code"]) == (404, "session_unknown")
