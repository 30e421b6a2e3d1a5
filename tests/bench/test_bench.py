"""The measurement runs, checks every answer, and leaves figures; how good they are is not tested here."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_short_run_has_figures_for_every_server_and_no_errors(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    words = f"-m bench.steps --seconds 0.2 --repeats 1 --clients 2 --json-bodies --json {figures}"
    run = subprocess.run([sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True, timeout=55)
    assert run.returncode == 0, run.stderr
    found = json.loads(figures.read_text())
    assert list(found["results"]) == ["ceiling", "echo", "unroll", "unroll-json", "naive"]
    for name, row in found["results"].items():
        assert name in run.stdout
        assert row["errors"] == 0
        assert row["rate"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert found["settings"]["clients"] == 2
    assert found["versions"]["uvloop"]
