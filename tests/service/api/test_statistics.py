"""The statistics extension: the counters, and `tritonclient`'s view of them on a running server."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.http as triton
from serving import Running, Serve

from unroll.service.telemetry.statistics import Statistics

NOTHING = {"count": 0, "ns": 0}


def test_before_the_first_batch() -> None:
    document = Statistics([(1, 1, 40e-6), (256, 1, 500e-6)], best_rows=256).document(now=7.0, wall=1e9)
    assert document == {
        "last_inference": 0,
        "inference_count": 0,
        "execution_count": 0,
        "inference_stats": dict.fromkeys(
            ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"), NOTHING
        ),
        "batch_stats": [],
        "step_count": 0,
        "warm_up": [{"rows": 1, "steps": 1, "ns": 40_000}, {"rows": 256, "steps": 1, "ns": 500_000}],
        "best_batch_size": 256,
    }


def test_a_batch_counts_for_each_of_its_rows() -> None:
    statistics = Statistics()
    statistics.observe(5.0, 4, 4, 4, 0, queue_seconds=8e-6, run_seconds=50e-6)
    statistics.observe(6.0, 1, 1, 1, 0, queue_seconds=1e-6, run_seconds=40e-6)
    statistics.observe(7.0, 4, 4, 4, 0, queue_seconds=1e-6, run_seconds=60e-6)
    document = statistics.document(now=9.5, wall=1000.0)
    assert document["last_inference"] == 997_500
    assert (document["inference_count"], document["execution_count"], document["step_count"]) == (9, 3, 9)
    assert document["inference_stats"] == {
        "success": {"count": 9, "ns": 10_000 + 480_000},
        "fail": NOTHING,
        "queue": {"count": 9, "ns": 10_000},
        "compute_input": {"count": 9, "ns": 0},
        "compute_infer": {"count": 9, "ns": 480_000},
        "compute_output": {"count": 9, "ns": 0},
    }
    assert document["batch_stats"] == [
        {
            "batch_size": 1,
            "compute_input": {"count": 1, "ns": 0},
            "compute_infer": {"count": 1, "ns": 40_000},
            "compute_output": {"count": 1, "ns": 0},
        },
        {
            "batch_size": 4,
            "compute_input": {"count": 2, "ns": 0},
            "compute_infer": {"count": 2, "ns": 110_000},
            "compute_output": {"count": 2, "ns": 0},
        },
    ]


def test_a_request_in_pieces_is_answered_once_and_waits_for_every_piece() -> None:
    statistics = Statistics()
    statistics.observe(1.0, 1, 64, 0, 0, queue_seconds=0.0, run_seconds=1e-3)
    statistics.observe(2.0, 1, 30, 1, 0, queue_seconds=2e-3, run_seconds=5e-4)
    stats = statistics.document(2.0, 2.0)
    assert (stats["inference_count"], stats["execution_count"], stats["step_count"]) == (1, 2, 94)
    assert stats["inference_stats"]["success"] == {"count": 1, "ns": 3_500_000}


def test_failed_row_does_not_count_as_success() -> None:
    statistics = Statistics()
    statistics.observe(1.0, 3, 3, 2, 1, queue_seconds=0.0, run_seconds=1e-4)
    stats = statistics.document(1.0, 1.0)["inference_stats"]
    assert stats["success"] == {"count": 2, "ns": 200_000}
    assert stats["fail"] == {"count": 1, "ns": 100_000}


# ── over HTTP ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def fresh(serve: Serve) -> Running:
    """A server used by this test only, so all counts are its own."""
    return serve()


@pytest.fixture
def client(fresh: Running) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(fresh.address)
    yield client
    client.close()


def infer(client: triton.InferenceServerClient, rows: int, steps: int, **sequence: object) -> None:
    x = triton.InferInput("x", [rows, steps, 3], "FP32")
    x.set_data_from_numpy(np.zeros((rows, steps, 3), np.float32))
    client.infer("gru", [x], model_version="1", **sequence)


def test_the_extension_is_advertised(client: triton.InferenceServerClient) -> None:
    assert "statistics" in client.get_server_metadata()["extensions"]


def test_of_all_models_of_one_and_of_one_version(client: triton.InferenceServerClient) -> None:
    def versions(*asked: str) -> list[tuple[str, str]]:
        found = client.get_inference_statistics(*asked)
        assert list(found) == ["model_stats"]
        return [(model["name"], model["version"]) for model in found["model_stats"]]

    assert {("gru", "1"), ("gru", "2"), ("lstm", "1")} < set(versions())
    assert versions("gru") == [("gru", "1"), ("gru", "2")]
    assert versions("gru", "1") == [("gru", "1")]
    for unknown in (("none",), ("gru", "7")):
        with pytest.raises(triton.InferenceServerException, match="model"):
            client.get_inference_statistics(*unknown)


def test_statistics_count_exactly_the_requests(client: triton.InferenceServerClient) -> None:
    def gru() -> dict:
        (model,) = client.get_inference_statistics("gru", "1")["model_stats"]
        return model

    before = gru()
    assert before["inference_count"] == before["execution_count"] == before["last_inference"] == 0
    began = time.time()
    infer(client, 1, 1, sequence_id=7, sequence_start=True)
    infer(client, 1, 1, sequence_id=7)
    infer(client, 5, 4)
    after = gru()
    assert after["inference_count"] == after["inference_stats"]["success"]["count"] == 7
    assert after["step_count"] == 2 + 20
    assert after["execution_count"] == sum(batch["compute_infer"]["count"] for batch in after["batch_stats"])
    assert sum(batch["batch_size"] * batch["compute_infer"]["count"] for batch in after["batch_stats"]) == 7
    assert began - 1 <= after["last_inference"] / 1e3 <= time.time() + 1
    stats = after["inference_stats"]
    assert stats["fail"] == NOTHING
    assert 0 < stats["compute_infer"]["ns"] <= stats["success"]["ns"] < 10e9
    assert stats["queue"]["ns"] > 0


def test_warm_up_is_reported(client: triton.InferenceServerClient) -> None:
    (model,) = client.get_inference_statistics("lstm")["model_stats"]
    assert {"rows": 1, "steps": 1} in [{"rows": w["rows"], "steps": w["steps"]} for w in model["warm_up"]]
    assert all(w["ns"] > 0 for w in model["warm_up"])
    assert 1 <= model["best_batch_size"] <= 256
