"""Open Inference requests no library would send: each is refused with a 4xx and a reason, and changes nothing."""

import json
from itertools import count

import httpx
import numpy as np
import pytest
import wire
from serving import Oracle, Running, Serve

_ids = count(1)

X = np.float32([[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]])
URL = "/v2/models/lstm/infer"


def assert_refused(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["code"] == code
    assert answer.json()["error"]


def document(**changes: object) -> dict:
    entry = {"name": "x", "shape": [1, 2, 3], "datatype": "FP32", "data": X.ravel().tolist()}
    entry.update(changes)
    return {"inputs": [{key: value for key, value in entry.items() if value is not ...}]}


def test_a_good_request_is_good(client: httpx.Client) -> None:
    assert client.post(URL, json=document()).status_code == 200
    assert client.post(URL, json=document(data=X.tolist())).status_code == 200
    assert wire.infer(client, "lstm", X).status_code == 200


def test_json_answers_are_flat_and_complete(client: httpx.Client, oracle) -> None:  # type: ignore[no-untyped-def]
    answer = client.post(URL, json={**document(), "id": "7"})
    assert answer.headers["content-type"] == "application/json"
    assert wire.HEADER_LENGTH not in answer.headers
    assert answer.json() == {
        "model_name": "lstm",
        "model_version": "1",
        "id": "7",
        "outputs": [
            {
                "name": "y",
                "datatype": "FP32",
                "shape": [1, 2, 2],
                "data": pytest.approx(oracle("lstm")(X[0]).ravel().tolist(), abs=0, rel=1e-7),
            }
        ],
    }


def test_the_header_length_may_cover_an_all_json_body(client: httpx.Client) -> None:
    text = json.dumps(document()).encode()
    assert client.post(URL, content=text, headers={wire.HEADER_LENGTH: str(len(text))}).status_code == 200


@pytest.mark.parametrize("length", ["0", "1", "-1", "+5", "x", "", "1.5", "1e3", "99999", "9" * 30, "0x10"])
def test_the_header_length_is_wrong(client: httpx.Client, length: str) -> None:
    made = wire.body({"x": X})
    answer = client.post(URL, content=made.content, headers={wire.HEADER_LENGTH: length})
    assert_refused(answer, 400, "malformed_request")


def test_the_header_length_is_off_by_one(client: httpx.Client) -> None:
    made = wire.body({"x": X})
    right = int(made.headers[wire.HEADER_LENGTH])
    for length in (right - 1, right + 1):
        answer = client.post(URL, content=made.content, headers={wire.HEADER_LENGTH: str(length)})
        assert 400 <= answer.status_code < 500
        assert answer.json()["error"]


def test_the_header_length_is_missing(client: httpx.Client) -> None:
    assert_refused(client.post(URL, content=wire.body({"x": X}).content), 400, "malformed_request")


def with_binary(size: object, content: bytes = X.tobytes(), **changes: object) -> tuple[bytes, dict[str, str]]:
    text = json.dumps(document(data=..., parameters={"binary_data_size": size}, **changes)).encode()
    return text + content, {wire.HEADER_LENGTH: str(len(text))}


@pytest.mark.parametrize("size", [0, 23, 25, 2**31, 2**63, 2**64, -1, -24, 24.0, "24", True, [24]])
def test_binary_data_size_disagrees(client: httpx.Client, size: object) -> None:
    content, headers = with_binary(size)
    answer = client.post(URL, content=content, headers=headers)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]


@pytest.mark.parametrize(
    "shape",
    [
        [],
        [1],
        [1, 2],
        [1, 2, 3, 1],
        [2, 1, 3],  # the same values as two sequences of one step are valid, and tested below
        [1, 3, 2],
        [0, 2, 3],
        [1, 0, 3],
        [1, -2, 3],
        [-1, -2, 3],
        [1, 2.0, 3],
        [1, "2", 3],
        [1, True, 3],
        [1, None, 3],
        [2**31, 2**31, 3],
        [2**62, 4, 3],
        [2**63, 2, 3],
        [2**64, 2, 3],
        [10**30, 2, 3],
        "1,2,3",
        None,
        {"0": 1},
    ],
)
@pytest.mark.parametrize("binary", [False, True])
def test_shapes(client: httpx.Client, shape: object, binary: bool) -> None:
    if binary:
        content, headers = with_binary(24, shape=shape)
        answer = client.post(URL, content=content, headers=headers)
    else:
        answer = client.post(URL, json=document(shape=shape))
    if shape == [2, 1, 3]:
        assert answer.status_code == 200
    else:
        assert_refused(answer, 422, "invalid_shape")


def test_a_huge_shape_with_its_size(client: httpx.Client) -> None:
    for batch in (10**6, 2**29, 2**61):
        content, headers = with_binary(batch * 24, shape=[batch, 2, 3])
        assert_refused(client.post(URL, content=content, headers=headers), 422, "invalid_shape")


@pytest.mark.parametrize("extra", [b"\0", bytes(24), b"{}"])
def test_bytes_after_the_last_tensor(client: httpx.Client, extra: bytes) -> None:
    made = wire.body({"x": X})
    assert_refused(client.post(URL, content=made.content + extra, headers=made.headers), 400, "malformed_request")


def test_tensors_cut_short(client: httpx.Client) -> None:
    made = wire.body({"x": X})
    for missing in (1, 4, 24):
        answer = client.post(URL, content=made.content[:-missing], headers=made.headers)
        assert answer.status_code in (400, 422)


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"datatype": "FP64"}, 422, "invalid_dtype"),
        ({"datatype": "fp32"}, 422, "invalid_dtype"),
        ({"datatype": None}, 422, "invalid_dtype"),
        ({"datatype": ["FP32"]}, 422, "invalid_dtype"),
        ({"name": "y"}, 400, "malformed_request"),
        ({"name": None}, 400, "malformed_request"),
        ({"name": ["x"]}, 400, "malformed_request"),
        ({"data": ...}, 422, "invalid_shape"),
        ({"data": []}, 422, "invalid_shape"),
        ({"data": [1, 2, 3, 4, 5]}, 422, "invalid_shape"),
        ({"data": [1, 2, 3, 4, 5, None]}, 422, "invalid_dtype"),
        ({"data": [1, 2, 3, 4, 5, "6"]}, 422, "invalid_dtype"),
        ({"data": [1, 2, 3, 4, 5, True]}, 422, "invalid_dtype"),
        ({"data": [[1, 2], [3, 4], [5, 6]]}, 422, "invalid_shape"),
        ({"data": [[[1, 2, 3], [4, 5]]]}, 422, "invalid_shape"),
        ({"data": [1, 2, 3, 4, 5, 1e39]}, 422, "non_finite_input"),
        ({"data": {"0": 1}}, 422, "invalid_shape"),
        ({"parameters": []}, 400, "malformed_request"),
        ({"parameters": {"binary_data_size": 24}}, 400, "malformed_request"),
    ],
)
def test_tensors(client: httpx.Client, changes: dict, status: int, code: str) -> None:
    assert_refused(client.post(URL, json=document(**changes)), status, code)


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": None},
        {"inputs": {}},
        {"inputs": []},
        {"inputs": [7]},
        {"inputs": document()["inputs"] * 2},
        {"id": 7},
        {"parameters": []},
        {"parameters": {"sequence_id": -1}},
        {"parameters": {"sequence_id": 1.5}},
        {"parameters": {"sequence_id": True}},
        {"parameters": {"sequence_id": [1]}},
        {"parameters": {"sequence_id": "a" * 129, "sequence_start": True}},
        {"parameters": {"sequence_start": True}},
        {"parameters": {"sequence_id": 0, "sequence_end": True}},
        {"parameters": {"sequence_id": "", "sequence_position": 0}},
        {"parameters": {"sequence_id": 1, "sequence_start": 1}},
        {"parameters": {"sequence_id": 1, "sequence_start": "true"}},
        {"parameters": {"sequence_id": 1, "sequence_position": -1}},
        {"parameters": {"sequence_id": 1, "sequence_position": "0"}},
        {"parameters": {"timeout": -1}},
        {"parameters": {"timeout": "1"}},
        {"parameters": {"binary_data_output": 1}},
        {"outputs": {}},
        {"outputs": ["y"]},
        {"outputs": [{}]},
        {"outputs": [{"name": 7}]},
        {"outputs": [{"name": "no"}]},
        {"outputs": [{"name": "y"}, {"name": "y"}]},
        {"outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]},
        {"outputs": [{"name": "y", "parameters": {"classification": 2}}]},
    ],
)
def test_documents(client: httpx.Client, changes: dict) -> None:
    assert_refused(client.post(URL, json={**document(), **changes}), 400, "malformed_request")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"inputs": [{"data": [NaN]}]}', b"[" * 10_000]
)
def test_no_documents(client: httpx.Client, content: bytes) -> None:
    assert_refused(client.post(URL, content=content), 400, "malformed_request")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sequence", [False, True])
def test_binary_that_is_not_finite(client: httpx.Client, value: float, sequence: bool) -> None:
    x = X.copy()
    x[0, 1, 1] = value
    if not sequence:
        assert_refused(wire.infer(client, "lstm", x), 422, "non_finite_input")
        return
    name = f"finite-{next(_ids)}"
    first = wire.infer(client, "lstm", X, sequence_id=name, sequence_start=True)
    path = f"/v1/models/lstm/sessions/{name}"
    before = client.get(f"{path}/state").content
    assert first.status_code == 200
    assert_refused(wire.infer(client, "lstm", x, sequence_id=name), 422, "non_finite_input")
    assert_refused(wire.infer(client, "lstm", x, sequence_id=name, sequence_end=True), 422, "non_finite_input")
    assert client.get(f"{path}/state").content == before


def test_an_unwanted_output_is_refused_before_anything_runs(client: httpx.Client) -> None:
    """Otherwise the state advances although the client gets an error."""
    name = f"unwanted-{next(_ids)}"
    wire.infer(client, "lstm", X, sequence_id=name, sequence_start=True).raise_for_status()
    path = f"/v1/models/lstm/sessions/{name}"
    before = client.get(path).json(), client.get(f"{path}/state").content
    body = {**document(), "parameters": {"sequence_id": name}, "outputs": [{"name": "no"}]}
    assert_refused(client.post(URL, json=body), 400, "malformed_request")
    assert (client.get(path).json(), client.get(f"{path}/state").content) == before


def test_a_start_that_is_refused_leaves_the_living_sequence(client: httpx.Client) -> None:
    name = f"kept-{next(_ids)}"
    wire.infer(client, "lstm", X, sequence_id=name, sequence_start=True).raise_for_status()
    path = f"/v1/models/lstm/sessions/{name}"
    before = client.get(path).json()
    bad = X.copy()
    bad[0, 0, 0] = np.nan
    for refused in (
        wire.infer(client, "lstm", bad, sequence_id=name, sequence_start=True),
        wire.infer(client, "lstm", np.repeat(X, 2, 0), sequence_id=name, sequence_start=True),
    ):
        assert refused.status_code == 422
    assert client.get(path).json() == before


def test_a_start_without_room_leaves_the_living_sequence(serve: Serve, background) -> None:  # type: ignore[no-untyped-def]
    running: Running = serve(max_queue=1)
    with httpx.Client(base_url=running.url) as client:
        wire.infer(client, "lstm", X, sequence_id=1, sequence_start=True).raise_for_status()
        before = client.get("/v1/models/lstm/sessions/1").json()
        with running.holding("lstm") as held:
            busy = background(wire.infer, client, "lstm", X, sequence_id=2, sequence_start=True)
            held.wait()
            refused = wire.infer(client, "lstm", X, sequence_id=1, sequence_start=True)
            assert_refused(refused, 503, "queue_full")
            assert refused.headers["retry-after"]
            unknown = wire.infer(client, "lstm", X, sequence_id=3, sequence_start=True)
            assert_refused(unknown, 503, "queue_full")
        assert busy.result().status_code == 200
        assert client.get("/v1/models/lstm/sessions/1").json() == before
        assert client.get("/v1/models/lstm/sessions/3").status_code == 404, "a refused request starts nothing"


def test_a_batch_larger_than_the_queue_is_not_worth_trying_again(serve: Serve) -> None:
    running: Running = serve(max_queue=4)
    with httpx.Client(base_url=running.url) as client:
        assert wire.infer(client, "lstm", np.repeat(X, 4, 0)).status_code == 200
        answer = wire.infer(client, "lstm", np.repeat(X, 5, 0))
        assert 400 <= answer.status_code < 500, answer.text
        assert running.model("lstm").scheduler.in_flight == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/none", 404),
        ("GET", "/v2/models/gru/versions/7", 404),
        ("GET", "/v2/models/gru/versions/x", 404),
        ("POST", "/v2/models/none/infer", 404),
        ("POST", "/v2/models/gru/versions/7/infer", 404),
        ("GET", "/v2/models/lstm/infer", 405),
        ("POST", "/v2", 405),
        ("GET", "/v2/nothing", 404),
    ],
)
def test_paths(client: httpx.Client, method: str, path: str, status: int) -> None:
    request = {"json": document()} if path.endswith("infer") and method == "POST" else {}
    answer = client.request(method, path, **request)  # type: ignore[arg-type]
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert answer.json()["error"]


def test_a_sequence_and_another_version(client: httpx.Client) -> None:
    name = f"version-{next(_ids)}"
    made = wire.body({"x": X}, sequence_id=name, sequence_start=True)
    first = client.post("/v2/models/gru/versions/1/infer", content=made.content, headers=made.headers)
    assert wire.outputs(first)[0]["model_version"] == "1"
    made = wire.body({"x": X}, sequence_id=name)
    second = client.post("/v2/models/gru/infer", content=made.content, headers=made.headers)
    assert wire.outputs(second)[0]["model_version"] == "1"
    answer = client.post("/v2/models/gru/versions/2/infer", content=made.content, headers=made.headers)
    assert_refused(answer, 409, "model_changed")


def test_a_sequence_of_the_protocol_is_a_session(client: httpx.Client, oracle) -> None:  # type: ignore[no-untyped-def]
    number = 2**64 - 1
    path = f"/v1/models/lstm/sessions/{number}"
    first = wire.infer(client, "lstm", X, sequence_id=number, sequence_start=True)
    assert wire.outputs(first)[0]["parameters"]["sequence_position"] == 2
    second = client.post(f"{path}/steps", json={"inputs": X[0].tolist()})
    assert second.json()["position"] == 4
    third = wire.infer(client, "lstm", X, sequence_id=str(number), sequence_end=True)
    whole: Oracle = oracle("lstm")
    assert np.array_equal(wire.outputs(third)[1]["y"][0], whole(np.tile(X[0], (3, 1)))[4:])
    assert client.get(path).status_code == 410


def test_timeouts_in_microseconds(serve: Serve, background) -> None:  # type: ignore[no-untyped-def]
    running: Running = serve()
    with httpx.Client(base_url=running.url) as client, running.holding("lstm") as held:
        busy = background(wire.infer, client, "lstm", X, sequence_id=1, sequence_start=True)
        held.wait()
        late = background(wire.infer, client, "lstm", X, timeout=1)  # refused at once, or when its turn comes
        held.release()
        answer = late.result()
        assert answer.status_code in (503, 504)
        assert answer.json()["code"] in ("deadline_unreachable", "deadline_exceeded")
        assert busy.result().status_code == 200


@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_tensors_in_shared_memory_are_refused_in_words(client: httpx.Client, where: str) -> None:
    region = {"shared_memory_region": "r", "shared_memory_byte_size": 12}
    tensor = {"name": "x", "shape": [1, 1, 3], "datatype": "FP32"}
    if where == "inputs":
        body = {"inputs": [{**tensor, "parameters": region}]}
    else:
        body = {"inputs": [{**tensor, "data": [1, 2, 3]}], "outputs": [{"name": "y", "parameters": region}]}
    answer = client.post("/v2/models/lstm/infer", json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_request")
    assert "does not support" in answer.json()["error"]


def test_a_connection_that_steps_starts_further_sequences_as_any_other(serve: Serve, oracle) -> None:  # type: ignore[no-untyped-def]
    running: Running = serve(session_capacity=4, spill_bytes=0)
    whole, counters = oracle("lstm"), running.model("lstm").scheduler.counters
    rng = np.random.default_rng(1)
    with httpx.Client(base_url=running.url) as client:

        def step(name: str, x: np.ndarray, **flags: bool) -> httpx.Response:
            return wire.infer(client, "lstm", x[np.newaxis, np.newaxis], sequence_id=name, **flags)

        def run(name: str, steps: int, *, ends: bool = True) -> None:
            xs = rng.standard_normal((steps, 3)).astype(np.float32)
            answers = [
                step(name, x, sequence_start=i == 0, sequence_end=ends and i == steps - 1) for i, x in enumerate(xs)
            ]
            outputs = [wire.outputs(answer)[1]["y"][0, 0] for answer in answers]
            assert np.array_equal(outputs, whole(xs))

        run("first", 3)
        run("of-one", 1)
        assert step("of-one", X[0, 0]).json()["code"] == "session_closed"
        run("first", 2, ends=False)
        run("first", 2)  # it replaces the open sequence
        assert (counters.opened, counters.restarted) == (4, 1)
        assert step("bad", X[0, 0] * np.nan, sequence_start=True).json()["code"] == "non_finite_input"
        assert step("bad", X[0, 0]).json()["code"] == "session_unknown", "a refused start opens nothing"
        assert step("x" * 129, X[0, 0], sequence_start=True).json()["code"] == "malformed_request"
        for i in range(6):
            run(f"room-{i}", 2, ends=False)
        assert step("room-0", X[0, 0]).json()["code"] == "session_evicted"
        assert (counters.opened, counters.chunks) == (10, 20)


def test_a_step_after_the_end_asks_for_start_in_tritons_words(client: httpx.Client) -> None:
    x = np.zeros((1, 1, 3), np.float32)
    for place in ({"sequence_start": True}, {"sequence_end": True}):
        assert wire.infer(client, "lstm", x, sequence_id="ended", **place).status_code == 200
    answer = wire.infer(client, "lstm", x, sequence_id="ended")
    assert (answer.status_code, answer.json()["code"]) == (410, "session_closed")
    assert "must specify the START flag" in answer.json()["error"]


def test_configuration_and_index_as_tritons_tools_read_them(client: httpx.Client) -> None:
    config = client.get("/v2/models/lstm/config").json()
    assert config == client.get("/v2/models/lstm/versions/1/config").json()
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 3]}]
    assert (config["max_batch_size"] > 1, "sequence_batching" in config) == (True, True)
    index = client.post("/v2/repository/index", json={"ready": True}).json()
    assert {"name": "lstm", "version": "1", "state": "READY", "reason": ""} in index
