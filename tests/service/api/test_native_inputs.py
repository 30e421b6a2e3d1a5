"""Invalid input to v1: each bad body gets its status and code and leaves the session unchanged."""

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from problems import GOOD, assert_problem
from serving import RAW, Running, Serve, raw_steps

from unroll.service.settings import Settings

JSON = {"Content-Type": "application/json"}


class Watched:
    """A session after three steps, and a check that it has not changed."""

    def __init__(self, client: httpx.Client, model: str, inputs: object) -> None:
        self.client = client
        self.model = model
        self.path = f"/v1/models/{model}/sessions/{client.post(f'/v1/models/{model}/sessions').json()['session_id']}"
        client.post(f"{self.path}/steps", json={"inputs": inputs}).raise_for_status()
        self.before = self._all()

    def _all(self) -> tuple[bytes, dict]:
        return self.client.get(f"{self.path}/state").content, self.client.get(self.path).json()

    def refuses(self, status: int, code: str, **request: object) -> httpx.Response:
        """Post to `steps`, check the status, code, format and that the session is unchanged, and return the answer."""
        answer = self.client.post(f"{self.path}/steps", **request)  # type: ignore[arg-type]
        assert_problem(answer, status, code)
        assert self._all() == self.before, "the session was touched"
        return answer


@pytest.fixture
def lstm(client: httpx.Client) -> Watched:
    return Watched(client, "lstm", GOOD * 3)


@pytest.fixture
def tokens(client: httpx.Client) -> Watched:
    return Watched(client, "tokens", [1, 2, 3])


@pytest.fixture
def two(client: httpx.Client) -> Watched:
    return Watched(client, "two", {"a": [[0.1, 0.2]], "b": GOOD})


MALFORMED = {
    "nothing": b"",
    "cut off": b'{"inputs": [[1, 2',
    "NaN literal": b'{"inputs": [[1, 2, NaN]]}',
    "Infinity literal": b'{"inputs": [[1, 2, Infinity]]}',
    "1e999": b'{"inputs": [[1, 2, 1e999]]}',
    "bad UTF-8": b'{"inputs": [[1, 2, 3]], "\xff": 1}',
    "lone surrogate": b'{"inputs": [[1, 2, "\\ud800"]]}',
    "nested too deep": b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a list": b"[[1, 2, 3]]",
    "a number": b"7",
    "no inputs": b"{}",
    "an unknown member": b'{"inputs": [[1, 2, 3]], "positions": 3}',
    "position null but misspelt": b'{"inputs": [[1, 2, 3]], "Position": null}',
    "position true": b'{"inputs": [[1, 2, 3]], "position": true}',
    "position a float": b'{"inputs": [[1, 2, 3]], "position": 3.0}',
    "position a string": b'{"inputs": [[1, 2, 3]], "position": "3"}',
    "position negative": b'{"inputs": [[1, 2, 3]], "position": -1}',
    "position beyond 64 bits": b'{"inputs": [[1, 2, 3]], "position": 36893488147419103232}',
    "a control character": b'{"inputs": [[1, 2, 3]], "a\nb": 1}',
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(lstm: Watched, body: bytes) -> None:
    lstm.refuses(400, "malformed_request", content=body, headers=JSON)


WRONG_VALUES = {
    "null": ([[1, 2, None]], "invalid_dtype"),
    "null step": ([None], "invalid_dtype"),
    "null for all": (None, "invalid_shape"),
    "string": ([[1, 2, "3"]], "invalid_dtype"),
    "a string for all": ("123", "invalid_shape"),
    "bool": ([[True, False, True]], "invalid_dtype"),
    "a bool among numbers": ([[1.0, 2.0, True]], "invalid_dtype"),
    "object": ([[1, 2, {}]], "invalid_dtype"),
    "an input's name that is not": ({"y": GOOD}, "invalid_shape"),
    "ragged": ([[1, 2, 3], [1, 2]], "invalid_shape"),
    "too narrow": ([[1, 2]], "invalid_shape"),
    "too wide": ([[1, 2, 3, 4]], "invalid_shape"),
    "one step without its list": ([1, 2, 3], "invalid_shape"),
    "a dimension too many": ([GOOD], "invalid_shape"),
    "no steps": ([], "invalid_shape"),
    "an empty step": ([[]], "invalid_shape"),
    "70 dimensions": ("deep", "invalid_shape"),
    "too large for float32": ([[1, 2, 1e39]], "non_finite_input"),
    "an integer too large for float64": ([[1, 2, 10**400]], None),
}


@pytest.mark.parametrize(("inputs", "code"), WRONG_VALUES.values(), ids=WRONG_VALUES.keys())
def test_wrong_values(lstm: Watched, inputs: object, code: str | None) -> None:
    if inputs == "deep":
        inputs = 1
        for _ in range(70):
            inputs = [inputs]
    if code is None:  # valid JSON, but too large for any dtype
        lstm.refuses(400, "malformed_request", json={"inputs": inputs})
    else:
        lstm.refuses(422, code, json={"inputs": inputs})


@pytest.mark.parametrize(
    ("inputs", "code"),
    [
        ([11], "input_out_of_range"),
        ([-1], "input_out_of_range"),
        ([0, 2**63 - 1], "input_out_of_range"),
        ([2**63], "input_out_of_range"),
        ([2**64 - 1], "input_out_of_range"),
        ([1.0], "invalid_dtype"),
        ([1, 2.5], "invalid_dtype"),
        ([True], "invalid_dtype"),
        ([1, True], "invalid_dtype"),
        (["1"], "invalid_dtype"),
        ([[1]], "invalid_shape"),
        ([], "invalid_shape"),
    ],
)
def test_wrong_tokens(tokens: Watched, inputs: object, code: str) -> None:
    tokens.refuses(422, code, json={"inputs": inputs})


def test_raw_tokens_out_of_range(tokens: Watched) -> None:
    for token in (11, -1, -(2**63)):
        x = np.array([1, token], "<i8")
        tokens.refuses(422, "input_out_of_range", content=x.tobytes(), headers=raw_steps(x))


@pytest.mark.parametrize(
    "inputs",
    [
        GOOD,
        {"a": [[1, 2]]},
        {"a": [[1, 2]], "b": GOOD, "c": GOOD},
        {"a": [[1, 2]], "b": GOOD * 2},
        {"a": GOOD, "b": [[1, 2]]},
        {"a": [], "b": []},
    ],
)
def test_wrong_named_inputs(two: Watched, inputs: object) -> None:
    two.refuses(422, "invalid_shape", json={"inputs": inputs})


@pytest.mark.parametrize("size", [0, 8, 12, 19, 40])
def test_raw_of_several_inputs_has_all_of_them(two: Watched, size: int) -> None:
    answer = two.refuses(422, "invalid_shape", content=bytes(size), headers=RAW)
    assert "'a' (8 bytes of float32), 'b' (12 bytes of float32)" in answer.json()["detail"]


@pytest.mark.parametrize("size", [0, 1, 11, 13])
def test_raw_of_the_wrong_length(lstm: Watched, size: int) -> None:
    lstm.refuses(422, "invalid_shape", content=bytes(size), headers=RAW)


@pytest.mark.parametrize("steps", [None, "2"])
def test_two_raw_steps_of_float64_are_not_four_of_float32(lstm: Watched, steps: str | None) -> None:
    x = np.tile(np.float64(GOOD), (2, 1))  # NumPy's default dtype
    headers = RAW if steps is None else {**RAW, "Unroll-Steps": steps}
    answer = lstm.refuses(422, "invalid_shape", content=x.tobytes(), headers=headers)
    assert "float64" in answer.json()["detail"]
    assert ("Unroll-Steps: 4" in answer.json()["detail"]) == (steps is None)


@pytest.mark.parametrize("steps", ["0", "1", "3", "9" * 18])
def test_raw_steps_that_contradict_their_number(lstm: Watched, steps: str) -> None:
    lstm.refuses(422, "invalid_shape", content=bytes(24), headers={**RAW, "Unroll-Steps": steps})


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_raw_sequence_must_come_with_its_number_of_steps(client: httpx.Client, count: int) -> None:
    content = np.tile(np.float32(GOOD), (count, 1)).tobytes()
    refused = client.post("/v1/models/lstm/sequences", content=content, headers=RAW)
    assert_problem(refused, 422, "invalid_shape")
    assert f"Unroll-Steps: {count}" in refused.json()["detail"]
    headers = {**RAW, "Unroll-Steps": str(count)}
    assert len(client.post("/v1/models/lstm/sequences", content=content, headers=headers).content) == count * 8


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_raw_that_is_not_finite(lstm: Watched, value: float) -> None:
    x = np.ones((4, 3), "<f4")
    x[2, 1] = value
    lstm.refuses(422, "non_finite_input", content=x.tobytes(), headers=raw_steps(x))


@pytest.mark.parametrize("encoding", ["json", "raw"])
def test_an_answer_that_is_not_finite(client: httpx.Client, encoding: str) -> None:
    session = Watched(client, "hot", GOOD * 2)
    x = np.array([[1, 1, 1], [3e38, 1, 1], [1, 1, 1]], np.float32)
    request = (
        {"content": x.tobytes(), "headers": raw_steps(x)} if encoding == "raw" else {"json": {"inputs": x.tolist()}}
    )
    answer = session.refuses(422, "non_finite_output", **request)
    assert "null" not in answer.text
    client.post(f"{session.path}/steps", json={"inputs": GOOD}).raise_for_status()


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/xml", ""])
def test_other_media_types(lstm: Watched, kind: str) -> None:
    lstm.refuses(415, "unsupported_media_type", content=b'{"inputs": [[1, 2, 3]]}', headers={"Content-Type": kind})


def test_no_media_type(lstm: Watched) -> None:
    lstm.refuses(415, "unsupported_media_type", content=b'{"inputs": [[1, 2, 3]]}')


def test_media_types_have_parameters_and_any_case(client: httpx.Client, lstm: Watched) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        answer = client.post(f"{lstm.path}/steps", content=b'{"inputs": [[1, 2, 3]]}', headers={"Content-Type": kind})
        assert answer.status_code == 200


@pytest.mark.parametrize("value", ["-1", "1.5", "x", "", "9" * 40, "1 2"])
@pytest.mark.parametrize("header", ["Unroll-Position", "Unroll-Steps", "Unroll-Timeout-Ms"])
def test_headers_hold_whole_numbers(lstm: Watched, header: str, value: str) -> None:
    lstm.refuses(400, "malformed_request", content=bytes(12), headers={**RAW, header: value})


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"inputs": []}, "invalid_shape"),
        ({"inputs": [[]]}, "invalid_shape"),
        ({"inputs": GOOD}, "invalid_shape"),
        ({"inputs": [GOOD, [[1, 2]]]}, "invalid_shape"),
        ({"inputs": [GOOD, "x"]}, "invalid_shape"),
        ({"inputs": [GOOD, [[1, 2, None]]]}, "invalid_dtype"),
        ({"inputs": {"x": [GOOD], "y": [GOOD]}}, "invalid_shape"),
    ],
)
def test_wrong_sequences(client: httpx.Client, body: object, code: str) -> None:
    assert_problem(client.post("/v1/models/lstm/sequences", json=body), 422, code)


def test_sequences_that_differ_in_number(client: httpx.Client) -> None:
    body = {"inputs": {"a": [[[1, 2]]], "b": [GOOD, GOOD]}}
    assert_problem(client.post("/v1/models/two/sequences", json=body), 422, "invalid_shape")


def test_one_bad_sequence_fails_the_request_and_leaves_nothing(client: httpx.Client, server: Running) -> None:
    huge = [[3e38, 1.0, 1.0]]
    answer = client.post("/v1/models/hot/sequences", json={"inputs": [GOOD * 50, huge, GOOD]})
    assert_problem(answer, 422, "non_finite_output")
    assert server.model("hot").scheduler.in_flight == 0


# ── paths and methods ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/models/lstm/sequences", 405, "method_not_allowed"),
        ("PUT", "/v1/models/lstm/sessions/a/steps", 405, "method_not_allowed"),
        ("GET", "/v1/models/lstm/sessions", 405, "method_not_allowed"),
        ("PATCH", "/v1/models/lstm/sessions/a", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/steps", 404, "not_found"),
        ("POST", "/v1/models/lstm/sessions/a/b/steps", 404, "not_found"),
        ("POST", "/v3/models/lstm/sessions/a/steps", 404, "not_found"),
        ("GET", "/v1/models/none", 404, "model_unknown"),
        ("GET", "/v1/models/lstm:7", 404, "model_unknown"),
        ("POST", "/v1/models/none/sessions", 404, "model_unknown"),
        ("POST", "/v1/models/none/sequences", 404, "model_unknown"),
        ("POST", "/v1/models/none/sessions/a/steps", 404, "model_unknown"),
        ("POST", "/v1/models//sessions/a/steps", 404, "not_found"),
        ("POST", "/v1/models/%00%0d%0a/sessions/a/steps", 404, "model_unknown"),
        ("POST", "/v1/models/%00%ff%0d%0a/sessions/a/steps", 400, "malformed_request"),
        ("GET", "/v1/models/lstm/sessions/never", 404, "session_unknown"),
        ("GET", "/v1/models/lstm/sessions/never/state", 404, "session_unknown"),
        ("DELETE", "/v1/models/lstm/sessions/never", 404, "session_unknown"),
        ("POST", "/v1/models/lstm/sessions/never/fork", 404, "session_unknown"),
        ("POST", "/v1/models/lstm/sessions/a%0d%0aX-A:%201/steps", 404, "session_unknown"),
    ],
)
def test_paths(client: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    request = {"json": {"inputs": GOOD}} if path.endswith(("steps", "sequences")) and method == "POST" else {}
    answer = client.request(method, path, **request)  # type: ignore[arg-type]
    assert_problem(answer, status, code)
    assert "x-a" not in answer.headers
    if status == 405:
        assert answer.headers["allow"]


# ── sizes ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def small(few: Path) -> Iterator[httpx.Client]:
    running = Running(Settings(repository=few, max_body_bytes=200_000, max_json_bytes=1_000, max_steps=100))
    with httpx.Client(base_url=running.url) as client:
        yield client
    running.stop()


def test_a_body_too_large_by_its_declared_length(small: httpx.Client) -> None:
    answer = small.post("/v1/models/lstm/sequences", content=bytes(200_001), headers=RAW)
    assert_problem(answer, 413, "body_too_large")


@pytest.mark.parametrize("piece", [1_000, 50_000])
def test_a_chunked_body_too_large(small: httpx.Client, piece: int) -> None:
    body = (bytes(piece) for _ in range(201_000 // piece + 1))
    assert_problem(small.post("/v1/models/lstm/sequences", content=body, headers=RAW), 413, "body_too_large")


def test_a_chunked_body_too_large_that_arrives_at_once(serve: Serve) -> None:
    running = serve(max_body_bytes=1_000)
    head = "POST /v1/models/lstm/sequences HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += "Content-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.sendall(head.encode() + b"4b0\r\n" + bytes(1_200) + b"\r\n0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_that_fits(small: httpx.Client) -> None:
    body = (bytes(6) for _ in range(10))
    answer = small.post("/v1/models/lstm/sequences", content=body, headers={**RAW, "Unroll-Steps": "5"})
    assert (answer.status_code, len(answer.content)) == (200, 5 * 8)


def test_json_has_a_limit_of_its_own(small: httpx.Client) -> None:
    answer = small.post("/v1/models/lstm/sequences", json={"inputs": [GOOD * 80]})
    assert_problem(answer, 413, "body_too_large")
    raw = np.tile(np.float32(GOOD), (100, 1))
    assert small.post("/v1/models/lstm/sequences", content=raw.tobytes(), headers=raw_steps(raw)).status_code == 200


def test_every_json_body_has_that_limit(small: httpx.Client) -> None:
    small.post("/v1/models/lstm/sessions", json={"session_id": "a"}).raise_for_status()
    body = {"session_id": "b", "state": [[]] * 1_000}
    for path in ("/v1/models/lstm/sessions", "/v1/models/lstm/sessions/a/fork"):
        assert_problem(small.post(path, json=body), 413, "body_too_large")


def test_more_sequences_than_can_ever_wait_are_not_worth_trying_again(serve: Serve) -> None:
    running = serve(max_queue=4)
    with httpx.Client(base_url=running.url) as client:
        assert client.post("/v1/models/lstm/sequences", json={"inputs": [GOOD] * 4}).status_code == 200
        answer = client.post("/v1/models/lstm/sequences", json={"inputs": [GOOD] * 5})
        assert answer.status_code in (413, 422), answer.text


def test_too_many_steps(small: httpx.Client) -> None:
    answer = small.post("/v1/models/lstm/sequences", content=bytes(101 * 12), headers={**RAW, "Unroll-Steps": "101"})
    assert_problem(answer, 422, "invalid_shape")


@pytest.mark.parametrize("path", ["/v1/models/lstm/sessions", "/v1/models/lstm/sessions/a/state"])
def test_every_route_limits_its_body(small: httpx.Client, path: str) -> None:
    method = "PUT" if path.endswith("state") else "POST"
    answer = small.request(method, path, content=bytes(200_001), headers=RAW)
    assert_problem(answer, 413, "body_too_large")


def test_json_may_say_its_position_in_the_header(lstm: Watched) -> None:
    headers = {"Unroll-Position": "3"}
    first = lstm.client.post(f"{lstm.path}/steps", json={"inputs": GOOD}, headers=headers)
    again = lstm.client.post(f"{lstm.path}/steps", json={"inputs": GOOD}, headers=headers)
    assert (first.status_code, first.content) == (200, again.content)
    assert lstm.client.get(lstm.path).json()["position"] == 4


def test_a_position_that_contradicts_itself(lstm: Watched) -> None:
    lstm.refuses(400, "malformed_request", json={"inputs": GOOD, "position": 3}, headers={"Unroll-Position": "4"})
    twice = [("Unroll-Position", "3"), ("Unroll-Position", "0"), ("Content-Type", "application/json")]
    lstm.refuses(400, "malformed_request", content=b'{"inputs": [[1, 2, 3]]}', headers=twice)


@pytest.mark.parametrize("api", ["v1", "v2"])
def test_a_long_answer_in_json_has_every_value_of_the_raw_one(client: httpx.Client, api: str) -> None:
    x = np.zeros((20_000, 3), np.float32)
    raw = client.post("/v1/models/lstm/sequences", content=x.tobytes(), headers=raw_steps(x)).content
    if api == "v1":
        answer = client.post("/v1/models/lstm/sequences", json={"inputs": [x.astype(int).tolist()]}).json()["outputs"]
    else:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, *x.shape], "data": x.astype(int).ravel().tolist()}
        answer = client.post("/v2/models/lstm/infer", json={"inputs": [tensor]}).json()["outputs"][0]["data"]
    assert np.float32(answer).tobytes() == raw
    assert np.float32(answer).size > 32_768
