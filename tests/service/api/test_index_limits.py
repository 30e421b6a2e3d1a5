"""Integers that index a table: out-of-range values are refused wherever forward uses them."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import onnxruntime
import pytest
from problems import assert_problem
from served_models import models
from serving import Oracle, Running

from unroll.service.settings import Settings

#: A valid step.
GOOD = {"token": 8, "kind": 3, "any": 3, "pair": [8, 4], "month": 12}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.link(tmp_path_factory.mktemp("tables"), "tables")


@pytest.fixture(scope="module")
def http(tables: Path) -> Iterator[httpx.Client]:
    running = Running(Settings(repository=tables))
    with httpx.Client(base_url=f"{running.url}/v1/models/tables") as client:
        yield client
    running.stop()


def test_limits_are_found_inside_a_loop(tables: Path) -> None:
    limits = {spec.name: spec.limit for spec in Oracle(tables, "tables").manifest.inputs}
    assert limits == {"token": 9, "kind": 4, "any": None, "pair": None, "month": None}


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"token": -1}, "input_out_of_range"),
        ({"token": -20}, "input_out_of_range"),
        ({"token": 999}, "input_out_of_range"),
        ({"kind": 4}, "input_out_of_range"),
        # The manifest has one limit for both elements and no lower limit, so the graph checks these itself.
        ({"pair": [-1, 0]}, "non_finite_output"),
        ({"pair": [0, 5]}, "non_finite_output"),
        ({"pair": [9, 0]}, "non_finite_output"),
        ({"month": 0}, "non_finite_output"),
        ({"month": 13}, "non_finite_output"),
    ],
)
def test_an_index_outside_its_table_is_refused(http: httpx.Client, wrong: dict, code: str) -> None:
    path = f"/sessions/{http.post('/sessions').json()['session_id']}"
    http.post(f"{path}/steps", json={"inputs": {name: [value] for name, value in GOOD.items()}}).raise_for_status()
    before = http.get(f"{path}/state").content
    steps = {name: [GOOD[name], wrong.get(name, GOOD[name])] for name in GOOD}
    assert_problem(http.post(f"{path}/steps", json={"inputs": steps}), 422, code)
    assert http.get(f"{path}/state").content == before


def test_an_index_outside_its_table_leaves_the_rest_of_the_batch(tables: Path) -> None:
    session = onnxruntime.InferenceSession(tables / "tables/1/model.onnx", providers=["CPUExecutionProvider"])
    feeds = {name: np.array([[value] * 2] * 3) for name, value in GOOD.items()}
    feeds |= {"state": np.zeros((3, 6), np.float32), "sequence_lens": np.array([2, 2, 1], np.int32)}
    right = session.run(["y", "state_out"], feeds)
    feeds["pair"][1:, 1] = [0, 5]  # within the second sequence, after the end of the third
    y, after = session.run(["y", "state_out"], feeds)
    assert np.isnan(y[1]).all()
    assert np.isnan(after[1]).all()
    for found, expected in zip((y, after), right, strict=True):
        assert np.array_equal(found[0], expected[0])
        assert np.array_equal(found[2].ravel()[:6], expected[2].ravel()[:6])
