"""An input that allows NaN takes it over every transport, as the PyTorch model does; other inputs refuse it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from problems import assert_problem
from served_models import models
from serving import Running

import unroll
from unroll import cli
from unroll.client.errors import NonFiniteInput
from unroll.service.settings import Settings

X = np.random.default_rng(3).standard_normal((12, 3)).astype("<f4")
X[[0, 0, 2, 3, 3, 3, 7, 11], [0, 2, 1, 0, 1, 2, 1, 0]] = np.nan
KNOWN = np.random.default_rng(4).standard_normal((12, 1)).astype("<f4")
RAW = {"Content-Type": "application/octet-stream"}
#: The inputs as JSON.
NULLS = [[None if np.isnan(value) else value for value in row] for row in X.tolist()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(Settings(repository=models.link(tmp_path_factory.mktemp("gaps"), "gaps")))
    yield running
    running.stop()


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as http:
        yield http


@pytest.fixture(scope="module")
def expected() -> Any:
    """The outputs of PyTorch, (12, 2)."""
    with torch.no_grad():
        return models.build("gaps/1").module(torch.from_numpy(X)[None], torch.from_numpy(KNOWN)[None])[0].numpy()


def steps(http: httpx.Client, **request: Any) -> httpx.Response:
    return http.post(f"/v1/models/gaps/sessions/{opened(http)}/steps", **request)


def opened(http: httpx.Client) -> str:
    return str(http.post("/v1/models/gaps/sessions").json()["session_id"])


def test_the_model_says_which_input(http: httpx.Client) -> None:
    inputs = http.get("/v1/models/gaps").json()["inputs"]
    assert {tensor["name"]: tensor["nan"] for tensor in inputs} == {"x": True, "known": False}


def test_null_in_json(http: httpx.Client, expected: Any) -> None:
    answer = steps(http, json={"inputs": {"x": NULLS, "known": KNOWN.tolist()}})
    np.testing.assert_allclose(answer.raise_for_status().json()["outputs"], expected, atol=1e-5)
    answer = http.post("/v1/models/gaps/sequences", json={"inputs": {"x": [NULLS], "known": [KNOWN.tolist()]}})
    np.testing.assert_allclose(answer.raise_for_status().json()["outputs"][0], expected, atol=1e-5)


def test_a_retry_with_missing_values_is_recognised(http: httpx.Client) -> None:
    path = f"/v1/models/gaps/sessions/{opened(http)}/steps"
    request = {"inputs": {"x": NULLS, "known": KNOWN.tolist()}, "position": 0}
    one, other = (http.post(path, json=request).raise_for_status().json() for _ in range(2))
    assert one["outputs"] == other["outputs"]
    assert other["position"] == 12


@pytest.mark.parametrize("binary", [False, True])
def test_open_inference(http: httpx.Client, expected: Any, binary: bool) -> None:
    tensors: list[dict[str, Any]] = [
        {"name": "x", "datatype": "FP32", "shape": [1, 12, 3], "data": [NULLS]},
        {"name": "known", "datatype": "FP32", "shape": [1, 12, 1], "data": KNOWN.ravel().tolist()},
    ]
    headers, content = {}, b""
    if binary:
        content = X.tobytes()
        del tensors[0]["data"]
        tensors[0]["parameters"] = {"binary_data_size": len(content)}
    head = json.dumps({"inputs": tensors}).encode()
    if binary:
        headers["Inference-Header-Content-Length"] = str(len(head))
    answer = http.post("/v2/models/gaps/infer", content=head + content, headers=headers).raise_for_status()
    np.testing.assert_allclose(np.reshape(answer.json()["outputs"][0]["data"], (12, 2)), expected, atol=1e-5)


def test_clients_send_it_in_steps_sequences_and_streams(server: Running, expected: Any) -> None:
    with unroll.Client(server.url) as client:
        assert [tensor.nan for tensor in client.model("gaps").inputs] == [True, False]
        given = {"x": X, "known": KNOWN}
        with client.session("gaps") as session:
            answers = [session.step({name: array[t] for name, array in given.items()}) for t in range(5)]
            answers += list(session.steps({name: array[5:] for name, array in given.items()}))
        np.testing.assert_allclose(answers, expected, atol=1e-5)
        np.testing.assert_allclose(client.sequences("gaps", [given])[0], expected, atol=1e-5)
        with client.stream("gaps") as stream:
            (session,) = stream.open(1)
            answers = list(session.steps({name: array[:7] for name, array in given.items()}))
            answers += list(session.steps({name: array[7:] for name, array in given.items()}))
        np.testing.assert_allclose(answers, expected, atol=1e-5)


def test_an_empty_cell_of_csv(
    server: Running, expected: Any, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    cells = [
        ["" if np.isnan(value) else str(value) for value in (*x, *known)] for x, known in zip(X, KNOWN, strict=True)
    ]
    (tmp_path / "x.csv").write_text("\n".join(map(",".join, cells)))
    assert cli.main(["stream", "gaps", str(tmp_path / "x.csv"), "--url", server.url]) == 0
    rows = [line.split(b",") for line in capsysbinary.readouterr().out.splitlines() if line[:1] in b"-0123456789"]
    np.testing.assert_allclose(np.array(rows, float), expected, atol=1e-5)


def test_infinity_and_nan_in_another_input_are_refused(http: httpx.Client, server: Running) -> None:
    infinite, unknown = X.copy(), KNOWN.copy()
    infinite[4, 1], unknown[4, 0] = np.inf, np.nan
    for x, known in ((infinite, KNOWN), (X, unknown)):
        answer = steps(http, content=x.tobytes() + known.tobytes(), headers=RAW | {"Unroll-Steps": "12"})
        assert_problem(answer, 422, "non_finite_input")
        with unroll.Client(server.url) as client, client.stream("gaps") as stream:
            (session,) = stream.open(1)
            with pytest.raises(NonFiniteInput):
                session.steps({"x": x, "known": known})
    huge = [[1e39, 0, 0], *NULLS[1:]]
    assert_problem(steps(http, json={"inputs": {"x": huge, "known": KNOWN.tolist()}}), 422, "non_finite_input")
    missing = [[None], *KNOWN.tolist()[1:]]
    assert_problem(steps(http, json={"inputs": {"x": NULLS, "known": missing}}), 422, "invalid_dtype")
