"""The benchmark runs, checks every answer and writes its figures. No test depends on their values."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from waiting import PATIENCE

from bench.load import Measurement
from bench.outcomes import Outcome, Row, Verdict, ratio
from bench.subjects import infer_request

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_quick_run_has_figures_and_no_errors(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    words = f"-m bench --quick --peers none --only websocket,start --models {models} --json {file}"
    run = subprocess.run(
        [sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE
    )
    assert run.returncode == 0, run.stdout + run.stderr
    outcomes = json.loads(file.read_text())["outcomes"]
    assert list(outcomes) == ["websocket", "websocket-small-256", "websocket-medium-256", "start"]
    assert [row["name"] for row in outcomes["websocket"]["rows"]] == ["ceiling", "ws-echo", "unroll-ws"]
    for outcome in outcomes.values():
        assert outcome["title"] in run.stdout
        assert not outcome["failed"]
        assert all(verdict["passed"] is None for verdict in outcome["verdicts"])  # quick figures are not judged
        for row in outcome["rows"]:
            assert all(turn["errors"] == 0 for turn in row["turns"])
            assert row["p50_ms"] <= row["p99_ms"]


@pytest.mark.parametrize("start", [False, True])
def test_infer_request_equals_tritonclients(start: bool) -> None:
    row = np.arange(4, dtype=np.float32)
    x = InferInput("x", [1, 1, 4], "FP32")
    x.set_data_from_numpy(row.reshape(1, 1, 4))
    wanted = [InferRequestedOutput("y", binary_data=True)]
    body, length = InferenceServerClient.generate_request_body(
        [x], outputs=wanted, sequence_id=7, sequence_start=start, sequence_end=False
    )
    head, _, ours = infer_request("m", 7, row, start=start).partition(b"\r\n\r\n")
    assert ours == body
    assert b"content-type" not in head
    assert f"inference-header-content-length: {length}".encode() in head


def test_ratio_is_of_medians_and_its_range_of_turns() -> None:
    ours, theirs = row("ours", 10.0, 30.0, 20.0), row("theirs", 10.0, 10.0, 40.0)
    verdict = ratio(1, "ours of theirs", 1.5, ours, theirs)
    assert (verdict.value, verdict.low, verdict.high, verdict.passed) == (2.0, 0.5, 3.0, True)
    assert ratio(1, "ours of a missing row", 1.5, ours, None).passed is None
    assert Verdict(7, "too slow", 120.0, 130.0, at_least=False).passed is False


def test_rows_limited_by_the_load_generator_are_marked() -> None:
    rows = [row("ceiling", 100.0), row("near", 90.0), row("far", 50.0), row("busy", 50.0, busy=0.95)]
    bound = {found["name"]: found["load_bound"] for found in Outcome("o", "", rows=rows).document()["rows"]}
    assert bound == {"ceiling": False, "near": True, "far": False, "busy": True}


def test_page_has_figures_between_its_marks_and_is_reproducible(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import documents

    curve = [Row("unroll", "", [Measurement(100.0, 1.0, 2.0)], at) for at in (1.0, 4.0)]
    verdict = ratio(1, "ours of theirs", 0.7, row("a", 8.0), row("b", 10.0))
    outcomes = [Outcome("clients", "Clients", "steps/s", curve), Outcome("http", "HTTP", "steps/s", [], [verdict])]
    about = {"date": "d", "command": ["c"], "cpu": "u", "cores": [0], "memory_gib": 1.0, "kernel": "k", "python": "p"}
    run = {"about": {**about, "versions": {}}, "settings": {"repeats": 5, "seconds": 3.0}, "remarks": []}
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"runs": [run], "outcomes": {o.name: o.document() for o in outcomes}}))
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nafter\n")
    written = []
    for _ in range(2):
        documents.write(documents.merged([results]), tmp_path)
        written.append({file.name: file.read_bytes() for file in tmp_path.iterdir()})
    assert written[0] == written[1]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| 1 | ours of theirs | 0.80× (0.80–0.80) | ≥ 0.7× | pass |" in text
    assert "bench-clients.svg" in written[0]


def row(name: str, *rates: float, busy: float = 0.1) -> Row:
    return Row(name, "", [Measurement(rate, 1.0, 2.0, busy=busy) for rate in rates])
