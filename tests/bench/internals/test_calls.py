"""The steps stay within their call budgets, and the report names any excess."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from waiting import PATIENCE

from bench.internals import calls

ROOT = Path(__file__).parents[3]
BUDGETS = {
    "raw step": Counter({"Python api.steps.steps": 1, "C api.steps.steps": 3, "writes": 1}),
    "frame of 1": Counter({"C api.stream.flow.Flow.take": 2, "writes": 1}),
}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """`check(figures, *flags)` runs the command on these figures and returns its exit status and output."""

    def call(figures: calls.Figures, *flags: str) -> tuple[int, str]:
        monkeypatch.setattr(calls, "measure", lambda: figures)
        status = calls.main(["--budgets", str(tmp_path / "budgets.json"), *flags])
        return status, "".join(capfd.readouterr())

    return call


def test_steps_are_within_their_budgets() -> None:
    command = [sys.executable, "-m", "bench.internals.calls"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stdout + run.stderr
    if run.stdout.startswith("skipped"):
        pytest.skip(run.stdout)
    assert "raw step " in run.stdout


def test_one_call_beyond_a_budget_fails_and_names_the_function(check) -> None:
    assert check(BUDGETS, "--write")[0] == 0
    assert check(BUDGETS)[0] == 0
    more = {**BUDGETS, "raw step": BUDGETS["raw step"] + Counter({"C api.steps.steps": 1})}
    status, output = check(more)
    assert status == 1
    assert "raw step: C 4, the budget is 3\n    +1 C api.steps.steps\n" in output
    assert "frame of 1:" not in output


def test_one_more_write_fails(check) -> None:
    check(BUDGETS, "--write")
    status, output = check({**BUDGETS, "frame of 1": BUDGETS["frame of 1"] + Counter({"writes": 1})})
    assert status == 1
    assert "frame of 1: writes 2, the budget is 1" in output


def test_path_without_a_budget_fails(check) -> None:
    check({"frame of 1": BUDGETS["frame of 1"]}, "--write")
    status, output = check(BUDGETS)
    assert status == 1
    assert "raw step: C 3, the budget is 0" in output


def test_fewer_calls_pass_and_can_become_the_budget(check) -> None:
    check(BUDGETS, "--write")
    fewer = {**BUDGETS, "raw step": BUDGETS["raw step"] - Counter({"C api.steps.steps": 1})}
    status, output = check(fewer)
    assert status == 0
    assert "--write" in output
    check(fewer, "--write")
    assert check(BUDGETS)[0] == 1


def test_version_of_python_without_budgets_is_skipped(check, monkeypatch: pytest.MonkeyPatch) -> None:
    check(BUDGETS, "--write")
    monkeypatch.setattr(calls, "VERSION", "3.99")
    status, output = check({})
    assert status == 0
    assert output.startswith("skipped: budgets.json has no budgets for Python 3.99")
