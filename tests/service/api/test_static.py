"""A model with static inputs, given once when a session opens or a sequence begins, over every transport."""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from served_models import models
from serving import RAW, Oracle, Running, Serve, raw_steps
from streams import Client
from wire import infer

from unroll.service.settings import Settings

KEY = "a key of at least 16 bytes"


@pytest.fixture(scope="session")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.link(tmp_path_factory.mktemp("static"), "voices")


@pytest.fixture(scope="module")
def running(voices: Path) -> Iterator[Running]:
    running = Running(Settings(repository=voices, snapshot_keys=(KEY,)))  # type: ignore[arg-type]
    yield running
    running.stop()


@pytest.fixture
def http(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{running.url}/v1/models/voices") as client:
        yield client


@pytest.fixture
def right(voices: Path) -> Callable[[np.ndarray, dict], np.ndarray]:
    model = Oracle(voices, "voices")

    def answer(x: np.ndarray, static: dict) -> np.ndarray:
        row = model.manifest.initial_row({name: np.array(value) for name, value in static.items()})
        return model.all(x, state=row)[0][0]

    return answer


ONE, TWO = {"speaker": 1, "gain": [0.5, -1.0]}, {"speaker": 6, "gain": [2.0, 0.25]}
X = np.random.default_rng(1).standard_normal((6, 3)).astype("<f4")


def test_sessions_begin_with_them(http: httpx.Client, right: Callable):
    for static in (ONE, TWO):
        session = http.post("/sessions", json={"static": static}).json()["session_id"]
        got = [http.post(f"/sessions/{session}/steps", content=row.tobytes(), headers=RAW).content for row in X]
        assert b"".join(got) == right(X, static).tobytes()


def test_sequences_begin_with_them(http: httpx.Client, right: Callable):
    static = {name: [ONE[name], TWO[name]] for name in ONE}
    answer = http.post("/sequences", json={"inputs": [X.tolist(), X[:4].tolist()], "static": static})
    for got, x, fixed in zip(answer.json()["outputs"], (X, X[:4]), (ONE, TWO), strict=True):
        assert np.array_equal(np.float32(got), right(x, fixed))


def test_states_that_clients_hold_begin_with_them(http: httpx.Client, right: Callable):
    opened = http.post("/sessions", json={"static": TWO, "durability": "client"}).json()
    sealed = base64.b64decode(opened["snapshot"])
    headers = {**raw_steps(X), "Unroll-Snapshot-Length": str(len(sealed))}
    answer = http.post(f"/sessions/{opened['session_id']}/steps", content=sealed + X.tobytes(), headers=headers)
    assert answer.content[int(answer.headers["Unroll-Snapshot-Length"]) :] == right(X, TWO).tobytes()


def test_streams_begin_with_them(running: Running, voices: Path, right: Callable):
    client = Client(running, Oracle(voices, "voices").manifest)
    client.open({"handle": 0, "static": ONE}, {"handle": 1, "static": TWO})
    replies = client.step((0, 0, X), (1, 0, X))
    for handle, static in enumerate((ONE, TWO)):
        assert np.array_equal(replies[handle].outputs[0], right(X, static))
    (refused,) = client.open({"handle": 2})
    assert refused["error"]["code"] == "invalid_shape"
    client.socket.close()


@pytest.mark.parametrize(
    ("static", "code"),
    [
        (None, "invalid_shape"),
        ({"speaker": 1}, "invalid_shape"),
        ({**ONE, "more": 1}, "invalid_shape"),
        ({**ONE, "gain": [1.0]}, "invalid_shape"),
        ({**ONE, "gain": 1.0}, "invalid_shape"),
        ({**ONE, "speaker": 7}, "input_out_of_range"),
        ({**ONE, "speaker": -1}, "input_out_of_range"),
        ({**ONE, "speaker": 1.5}, "invalid_dtype"),
        ({**ONE, "gain": ["a", "b"]}, "invalid_dtype"),
        ({**ONE, "gain": [1e39, 0.0]}, "non_finite_input"),
    ],
)
def test_wrong_static_inputs_are_refused(http: httpx.Client, static: dict | None, code: str):
    answer = http.post("/sessions", json={"static": static})
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    several = None if static is None else {name: [value] for name, value in static.items()}
    answer = http.post("/sequences", json={"inputs": [X.tolist()], "static": several})
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text


def test_raw_and_open_inference_sequences_cannot_give_static_inputs(http: httpx.Client, running: Running):
    assert http.post("/sequences", content=X.tobytes(), headers=raw_steps(X)).json()["code"] == "invalid_shape"
    answer = http.post("/sessions", json={"static": ONE, "state": [0.0] * 11})
    assert answer.json()["code"] == "malformed_request"
    with httpx.Client(base_url=running.url) as client:
        for options in ({}, {"sequence_id": 1, "sequence_start": True}):
            assert infer(client, "voices", X, **options).json()["code"] == "invalid_shape"
        info = client.get("/v1/models/voices").json()
    assert [spec["name"] for spec in info["static"]] == ["speaker", "gain"]


def test_model_without_static_inputs_refuses_them(serve: Serve):
    with httpx.Client(base_url=f"{serve().url}/v1/models/lstm") as client:
        assert client.post("/sessions", json={"static": {"a": 1}}).json()["code"] == "invalid_shape"
        assert client.post("/sessions", json={"static": {}}).status_code == 201
