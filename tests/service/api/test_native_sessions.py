"""v1 from the client's side: open, step, inspect, save, restore, fork, close. Numbers are compared bit for bit."""

import base64
import json
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from serving import RAW, Oracle, Running, raw_steps
from waiting import until

Oracles = Callable[..., Oracle]


def opened(client: httpx.Client, model: str, **body: object) -> str:
    answer = client.post(f"/v1/models/{model}/sessions", json=body)
    assert answer.status_code == 201, answer.text
    return f"/v1/models/{model}/sessions/{answer.json()['session_id']}"


def floats(values: object) -> np.ndarray:
    return np.array(values, np.float32)


def from_raw(answer: httpx.Response, width: int = 2) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/octet-stream"
    return np.frombuffer(answer.content, "<f4").reshape(-1, width)


def test_open_reports_the_guarantees_of_the_session(client: httpx.Client, oracle: Oracles) -> None:
    info = client.post("/v1/models/lstm/sessions").json()
    assert len(info.pop("session_id")) >= 22, "128 random bits in Base64"
    assert info == {
        "position": 0,
        "model": "lstm",
        "model_version": "1",
        "model_digest": oracle("lstm").manifest.digest,
        "durability": "memory",
        "idle_timeout": 900.0,
    }


def test_ids_made_here_differ(client: httpx.Client) -> None:
    assert len({opened(client, "lstm") for _ in range(20)}) == 20


def test_long_raw_answer_is_complete(client: httpx.Client, oracle: Oracles, rng: np.random.Generator) -> None:
    x = rng.standard_normal((20_000, 3), np.float32)
    expected = oracle("lstm")(x)
    for path in ("/v1/models/lstm/sequences", f"{opened(client, 'lstm')}/steps"):
        assert np.array_equal(from_raw(client.post(path, content=x.tobytes(), headers=raw_steps(x))), expected)


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2]])
@pytest.mark.parametrize("encoding", ["json", "raw"])
def test_streamed_is_whole(
    client: httpx.Client, oracle: Oracles, rng: np.random.Generator, chunks: list[int], encoding: str
) -> None:
    x = rng.standard_normal((12, 3)).astype(np.float32)
    session = opened(client, "lstm")
    outputs, position = [], 0
    for length in chunks:
        chunk = x[position : position + length]
        position += length
        if encoding == "raw":
            answer = client.post(f"{session}/steps", content=chunk.tobytes(), headers=raw_steps(chunk))
            outputs.append(from_raw(answer))
        else:
            answer = client.post(f"{session}/steps", json={"inputs": chunk.tolist()})
            assert answer.json()["position"] == position
            outputs.append(floats(answer.json()["outputs"]))
        assert answer.headers["unroll-position"] == str(position)
    assert np.array_equal(np.concatenate(outputs), oracle("lstm")(x))
    assert client.get(session).json()["position"] == 12


def test_json_and_raw_may_alternate(client: httpx.Client, oracle: Oracles, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 3)).astype(np.float32)
    session = opened(client, "gru:1")
    first = client.post(f"{session}/steps", json={"inputs": x[:1].tolist()})
    second = client.post(f"{session}/steps", content=x[1:].tobytes(), headers=raw_steps(x[1:]))
    whole = oracle("gru", "1")(x)
    assert np.array_equal(floats(first.json()["outputs"]), whole[:1])
    assert np.array_equal(from_raw(second), whole[1:])


def test_two_inputs_and_two_outputs(client: httpx.Client, oracle: Oracles, rng: np.random.Generator) -> None:
    a, b = (rng.standard_normal((5, width)).astype(np.float32) for width in (2, 3))
    (level, slope), _ = oracle("two").all(a, b)
    session = opened(client, "two")
    streamed: dict[str, list] = {"level": [], "slope": []}
    for cut in (slice(0, 2), slice(2, 5)):
        inputs = {"a": a[cut].tolist(), "b": b[cut].tolist()}
        outputs = client.post(f"{session}/steps", json={"inputs": inputs}).json()["outputs"]
        assert outputs.keys() == streamed.keys()
        for name in streamed:
            streamed[name] += outputs[name]
    assert np.array_equal(floats(streamed["level"]), level)
    assert np.array_equal(floats(streamed["slope"]), slope)
    whole = client.post("/v1/models/two/sequences", json={"inputs": {"a": [a.tolist()], "b": [b.tolist()]}}).json()
    assert np.array_equal(floats(whole["outputs"]["level"][0]), level)
    assert np.array_equal(floats(whole["outputs"]["slope"][0]), slope)


def test_tokens(client: httpx.Client, oracle: Oracles) -> None:
    token = np.array([1, 10, 0, 4], np.int64)
    session = opened(client, "tokens")
    first = client.post(f"{session}/steps", json={"inputs": token[:2].tolist()})
    second = client.post(f"{session}/steps", content=token[2:].astype("<i8").tobytes(), headers=raw_steps(token[2:]))
    whole = oracle("tokens")(token)
    assert np.array_equal(floats(first.json()["outputs"]), whole[:2])
    assert np.array_equal(from_raw(second, 11), whole[2:])


def test_the_last_step_only(client: httpx.Client, oracle: Oracles, rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 3)).astype(np.float32)
    session = opened(client, "last")
    answers = [client.post(f"{session}/steps", json={"inputs": x[cut].tolist()}) for cut in (slice(0, 4), slice(4, 6))]
    for answer, end in zip(answers, (4, 6), strict=True):
        assert np.array_equal(floats(answer.json()["outputs"]), oracle("last")(x[:end]))


def test_a_model_that_needs_whole_sequences(client: httpx.Client, oracle: Oracles, rng: np.random.Generator) -> None:
    refused = client.post("/v1/models/whole/sessions")
    assert (refused.status_code, refused.json()["code"]) == (422, "not_streamable")
    assert "bidirectional" in refused.json()["detail"]
    x = rng.standard_normal((6, 3)).astype(np.float32)
    answer = client.post("/v1/models/whole/sequences", content=x.tobytes(), headers=raw_steps(x))
    assert np.array_equal(from_raw(answer), oracle("whole")(x))


@pytest.mark.parametrize("model", ["lstm", "whole", "last"])
def test_ragged_sequences(client: httpx.Client, oracle: Oracles, rng: np.random.Generator, model: str) -> None:
    sequences = [rng.standard_normal((length, 3)).astype(np.float32) for length in (4, 1, 9, 200, 4)]
    answer = client.post(f"/v1/models/{model}/sequences", json={"inputs": [x.tolist() for x in sequences]})
    outputs = answer.json()["outputs"]
    assert len(outputs) == len(sequences)
    for output, x in zip(outputs, sequences, strict=True):
        assert np.array_equal(floats(output), oracle(model)(x))


def test_a_version_can_be_named(client: httpx.Client, oracle: Oracles, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 3)).astype(np.float32)
    for reference, version in (("gru", "2"), ("gru:1", "1"), ("gru:2", "2")):
        session = opened(client, reference)
        assert client.get(session).json()["model_version"] == version
        answer = client.post(f"{session}/steps", content=x.tobytes(), headers=raw_steps(x))
        assert np.array_equal(from_raw(answer), oracle("gru", version)(x))
        assert client.get(f"/v1/models/{reference}").json()["version"] == version


def test_session_is_found_by_its_models_name_without_a_version(client: httpx.Client) -> None:
    path = opened(client, "gru:1")
    unversioned = path.replace("gru:1", "gru")
    assert client.get(unversioned).json()["model_version"] == "1"
    assert client.get(path.replace("gru:1", "gru:2")).json()["code"] == "model_changed"


def test_models_are_described(client: httpx.Client, oracle: Oracles) -> None:
    listed = {model["name"]: model for model in client.get("/v1/models").json()}
    assert {"lstm", "gru", "last", "whole", "tokens", "two", "hot"} == listed.keys()
    assert listed["gru"]["version"] == "2"
    token = {"name": "token", "dtype": "int64", "shape": [], "time": True, "limit": 11, "rate": None, "nan": False}
    assert listed["tokens"]["inputs"] == [token]
    y = {"name": "y", "dtype": "float32", "shape": [2], "time": False, "limit": None, "rate": None, "nan": False}
    assert listed["last"]["outputs"] == [y]
    assert not listed["whole"]["streamable"]
    assert listed["lstm"]["state_size"] == oracle("lstm").manifest.state_size


# ── snapshots ────────────────────────────────────────────────────────────────────────────────────


def stepped(client: httpx.Client, model: str, x: np.ndarray) -> str:
    session = opened(client, model)
    client.post(f"{session}/steps", content=x.tobytes(), headers=raw_steps(x)).raise_for_status()
    return session


@pytest.mark.parametrize("form", ["base64", "raw", "put"])
def test_restored_is_uninterrupted(client: httpx.Client, oracle: Oracles, rng: np.random.Generator, form: str) -> None:
    x = rng.standard_normal((7, 3)).astype(np.float32)
    session = stepped(client, "lstm", x[:4])
    saved = client.get(f"{session}/state")
    assert saved.headers["unroll-position"] == "4"
    assert saved.headers["content-type"] == "application/octet-stream"
    if form == "base64":
        restored = opened(client, "lstm", snapshot=base64.b64encode(saved.content).decode())
    elif form == "raw":
        info = client.post("/v1/models/lstm/sessions", content=saved.content, headers=RAW).json()
        assert info["position"] == 4
        restored = f"/v1/models/lstm/sessions/{info['session_id']}"
    else:
        restored = stepped(client, "lstm", rng.standard_normal((2, 3)).astype(np.float32))
        assert client.put(f"{restored}/state", content=saved.content, headers=RAW).json()["position"] == 4
    assert client.get(f"{restored}/state").content == saved.content
    whole = oracle("lstm")(x)
    for path in (restored, session):
        answer = client.post(
            f"{path}/steps", content=x[4:].tobytes(), headers={**raw_steps(x[4:]), "Unroll-Position": "4"}
        )
        assert np.array_equal(from_raw(answer), whole[4:])


def test_the_snapshot_of_a_fresh_session_is_the_initial_state(client: httpx.Client, oracle: Oracles) -> None:
    content = client.get(f"{opened(client, 'two')}/state").content
    row = np.frombuffer(content[52:-16], "<f4")
    assert np.array_equal(row, oracle("two").manifest.initial_row())
    assert np.any(row != 0)


def test_a_restored_session_forgets_the_replies_of_its_other_past(
    client: httpx.Client, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((2, 3)).astype(np.float32)
    session = opened(client, "lstm")
    start = client.get(f"{session}/state").content
    first = client.post(f"{session}/steps", content=x.tobytes(), headers={**raw_steps(x), "Unroll-Position": "0"})
    client.put(f"{session}/state", content=start, headers=RAW).raise_for_status()
    other = client.post(
        f"{session}/steps", content=(2 * x).tobytes(), headers={**raw_steps(2 * x), "Unroll-Position": "0"}
    )
    assert other.status_code == 200
    assert other.content != first.content


def test_open_with_a_state_row(client: httpx.Client, oracle: Oracles, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 3)).astype(np.float32)
    row = rng.standard_normal(oracle("lstm").manifest.state_size).astype(np.float32)
    session = opened(client, "lstm", state=row.tolist())
    answer = client.post(f"{session}/steps", content=x.tobytes(), headers=raw_steps(x))
    assert np.array_equal(from_raw(answer), oracle("lstm").all(x, state=row)[0][0])


def damaged(content: bytes) -> list[bytes]:
    flipped = [
        content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in (0, 4, 6, 8, 40, 48, 60, len(content) - 1)
    ]
    return [*flipped, content[:-1], content + b"\0", content[:20], b"", b"UNRL" + bytes(200)]


def test_a_damaged_snapshot_is_refused_and_changes_nothing(client: httpx.Client, rng: np.random.Generator) -> None:
    session = stepped(client, "lstm", rng.standard_normal((2, 3)).astype(np.float32))
    content = client.get(f"{session}/state").content
    for bad in damaged(content):
        for answer in (
            client.put(f"{session}/state", content=bad, headers=RAW),
            client.post("/v1/models/lstm/sessions", content=bad, headers=RAW),
        ):
            assert (answer.status_code, answer.json()["code"]) == (422, "snapshot_invalid")
    assert client.get(f"{session}/state").content == content


def test_a_snapshot_of_another_model_is_refused(client: httpx.Client) -> None:
    content = client.get(f"{opened(client, 'gru:1')}/state").content
    for model in ("gru:2", "lstm"):
        answer = client.post(f"/v1/models/{model}/sessions", content=content, headers=RAW)
        assert (answer.status_code, answer.json()["code"]) == (409, "model_changed")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"session_id": ""}, 400, "malformed_request"),
        ({"session_id": "a" * 129}, 400, "malformed_request"),
        ({"session_id": 7}, 400, "malformed_request"),
        ({"session": "a"}, 400, "malformed_request"),
        ({"snapshot": "not Base64!"}, 400, "malformed_request"),
        ({"snapshot": base64.b64encode(b"short").decode()}, 422, "snapshot_invalid"),
        ({"state": [0.0] * 3}, 422, "invalid_shape"),
        ({"state": [1e300] * 32}, 422, "non_finite_input"),
        ({"state": ["0"] * 32}, 400, "malformed_request"),
        ({"state": [0.0] * 32, "snapshot": ""}, 400, "malformed_request"),
        ([], 400, "malformed_request"),
    ],
)
def test_invalid_open_is_refused(client: httpx.Client, body: object, status: int, code: str) -> None:
    before = client.get("/v1/models/lstm").json()["sessions"]
    answer = client.post("/v1/models/lstm/sessions", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert client.get("/v1/models/lstm").json()["sessions"] == before


def test_lone_surrogate_is_not_an_id(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/models/lstm/sessions", content=b'{"session_id": "\\ud800"}', headers=headers)
    assert answer.status_code == 400


# ── fork and close ───────────────────────────────────────────────────────────────────────────────


def test_fork_is_independent_of_its_origin(client: httpx.Client, oracle: Oracles, rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 3)).astype(np.float32)
    session = stepped(client, "lstm", x[:3])
    forked = client.post(f"{session}/fork")
    assert forked.status_code == 201
    assert forked.json()["position"] == 3
    other = f"/v1/models/lstm/sessions/{forked.json()['session_id']}"
    there = from_raw(client.post(f"{other}/steps", content=(-x[3:]).tobytes(), headers=raw_steps(-x[3:])))
    here = from_raw(client.post(f"{session}/steps", content=x[3:].tobytes(), headers=raw_steps(x[3:])))
    assert np.array_equal(here, oracle("lstm")(x)[3:])
    assert np.array_equal(there, oracle("lstm")(np.concatenate([x[:3], -x[3:]]))[3:])


def test_a_fork_of_a_fresh_session_begins_at_the_initial_state(
    client: httpx.Client, oracle: Oracles, rng: np.random.Generator
) -> None:
    a, b = (rng.standard_normal((2, width)).astype(np.float32) for width in (2, 3))
    session = opened(client, "two")
    name = client.post(f"{session}/fork", json={"session_id": "fork-of-fresh"}).json()["session_id"]
    body = {"inputs": {"a": a.tolist(), "b": b.tolist()}}
    outputs = client.post(f"/v1/models/two/sessions/{name}/steps", json=body).json()["outputs"]
    assert np.array_equal(floats(outputs["level"]), oracle("two").all(a, b)[0][0])


def test_a_fork_outlives_its_origin(client: httpx.Client, oracle: Oracles, rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 3)).astype(np.float32)
    session = stepped(client, "lstm", x[:2])
    name = client.post(f"{session}/fork").json()["session_id"]
    client.delete(session).raise_for_status()
    stepped(client, "lstm", 9 * x)  # it may take the freed row
    answer = client.post(f"/v1/models/lstm/sessions/{name}/steps", content=x[2:].tobytes(), headers=raw_steps(x[2:]))
    assert np.array_equal(from_raw(answer), oracle("lstm")(x)[2:])


def test_a_fork_under_a_living_or_bad_id_is_refused(client: httpx.Client) -> None:
    session = opened(client, "lstm")
    taken = opened(client, "lstm").rpartition("/")[2]
    answer = client.post(f"{session}/fork", json={"session_id": taken})
    assert (answer.status_code, answer.json()["code"]) == (409, "session_exists")
    assert client.post(f"{session}/fork", json={"session_id": "a" * 129}).status_code == 400
    assert client.post(f"{session}/fork", content=b"x", headers=RAW).status_code == 415


def test_close_and_reopen(client: httpx.Client, oracle: Oracles, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 3)).astype(np.float32)
    session = opened(client, "lstm", session_id="anew")
    client.post(f"{session}/steps", content=x.tobytes(), headers=raw_steps(x))
    closed = client.delete(session)
    assert (closed.status_code, closed.json()["position"]) == (200, 2)
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/state"), ("POST", "/fork"), ("POST", "/steps")):
        content = x.tobytes() if path == "/steps" else None
        answer = client.request(method, session + path, content=content, headers=raw_steps(x) if content else None)
        assert (answer.status_code, answer.json()["code"]) == (410, "session_closed")
    opened(client, "lstm", session_id="anew")
    answer = client.post(f"{session}/steps", content=x.tobytes(), headers={**raw_steps(x), "Unroll-Position": "0"})
    assert np.array_equal(from_raw(answer), oracle("lstm")(x))


def test_close_completes_running_work_and_fails_waiting_work(
    serve: Callable[..., Running], rng: np.random.Generator, background: Callable
) -> None:
    server = serve()
    scheduler = server.model("lstm").scheduler
    x = rng.standard_normal((1, 3)).astype(np.float32)
    with httpx.Client(base_url=server.url) as client:
        session = opened(client, "lstm")
        with server.holding("lstm") as held:
            runs = background(client.post, f"{session}/steps", content=x.tobytes(), headers=raw_steps(x))
            held.wait()
            waits = background(client.post, f"{session}/steps", content=x.tobytes(), headers=raw_steps(x))
            saves = background(client.get, f"{session}/state")
            until(lambda: len(next(iter(scheduler.sessions)).own_progress.queue()) == 3)
            assert client.delete(session).status_code == 200
            assert (waits.result().status_code, waits.result().json()["code"]) == (410, "session_closed")
            assert (saves.result().status_code, saves.result().json()["code"]) == (410, "session_closed")
            again = client.post("/v1/models/lstm/sessions", json={"session_id": session.rpartition("/")[2]})
            assert again.status_code == 201, "the id is free although the old session is still leaving"
        assert runs.result().status_code == 200
        assert client.get(session).json()["position"] == 0


def test_replies_are_json_a_strict_parser_takes(client: httpx.Client, rng: np.random.Generator) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    session = opened(client, "lstm")
    for scale in (1e-40, 1.0, 1e30):
        inputs = (rng.standard_normal((3, 3)) * scale).tolist()
        text = client.post(f"{session}/steps", json={"inputs": inputs}).text
        assert "null" not in text
        json.loads(text, parse_constant=refuse)
