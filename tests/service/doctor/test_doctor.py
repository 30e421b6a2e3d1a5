"""`unroll doctor` as a process on the test machine, and its report on synthetic machines."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from machines import CPU, GPU
from waiting import PATIENCE

from unroll import cli
from unroll.service.doctor import ask
from unroll.service.doctor import report as doctor
from unroll.service.doctor.findings import Finding, Status
from unroll.service.engine.runner import resolve_devices


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unroll", "doctor", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE)


def test_this_machine(tmp_path: Path):
    ran = run("--device", "cpu", cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert {line.split()[0] for line in ran.stdout.splitlines()} <= {*Status, "→"}
    assert "ok       LSTM on cpu" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("ok       --device cpu")


def test_this_machine_as_json(capsys: pytest.CaptureFixture[str]):
    if resolve_devices("auto")[0] != ("cpu",):
        pytest.skip("needs a machine without a GPU")
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["works"], report["device"]) == (True, "auto")
    assert report["facts"]["runtime"]["auto"] == ["cpu"]
    assert report["facts"]["sessions"] == {"cpu": None}
    assert report["findings"][-1]["says"].startswith("selects cpu (no GPU: ")


def test_absent_device_is_reported(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", "--device", "cuda:99", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["works"]
    assert "cuda:99 was requested, but" in report["facts"]["sessions"]["cuda:99"]


def test_a_broken_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libstdc++ is too old')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ran = run(cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert re.search(r"^broken +onnxruntime .*libstdc\+\+ is too old", ran.stdout, re.MULTILINE)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:0,cpu"])
def test_unknown_device_is_refused(device: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", "--device", device]) == 2
    assert "use cpu, auto, or GPUs" in capsys.readouterr().err


def test_the_device_of_the_environment_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setenv("UNROLL_DEVICE", "cuda:0")
    monkeypatch.setattr(doctor, "examine", lambda device: asked.append(device) or GPU)
    assert cli.main(["doctor"]) == 0
    assert asked == ["cuda:0"]


@pytest.mark.parametrize(("facts", "device", "status"), [(GPU, "auto", 0), (CPU, "auto", 0), (CPU, "cuda:0", 1)])
def test_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], facts, device, status):
    monkeypatch.setattr(doctor, "examine", lambda _: facts)
    assert cli.main(["doctor", "--device", device]) == status
    capsys.readouterr()
    assert cli.main(["doctor", "--device", device, "--json"]) == status
    assert json.loads(capsys.readouterr().out)["works"] == (status == 0)


def test_shared_remedy_is_printed_once():
    findings = [
        Finding("a", Status.OK, "here"),
        Finding("bcd", Status.MISSING, "gone", "install it"),
        Finding("e", Status.MISSING, "gone too", "install it"),
    ]
    assert list(doctor.lines(findings)) == [
        "ok       a    here",
        "missing  bcd  gone",
        "missing  e    gone too",
        "              → install it",
    ]


def test_dead_process_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    for program, problem in [
        ("import os; os.abort()", "the process was killed: Aborted (signal 6)"),
        ("import onnxruntime_that_is_not_there", "No module named 'onnxruntime_that_is_not_there'"),
        ("raise SystemExit(3)", "exit status 3"),
    ]:
        monkeypatch.setattr(ask, "_command", lambda *_, program=program: [sys.executable, "-c", program])
        assert problem in str(ask.session("cuda:0"))


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        ("runs on the CPU", "runs on the CPU; onnxruntime logged: no libcublas"),
        ("refused: no libcublas", "refused: no libcublas"),
        (None, None),
    ],
)
def test_onnxruntime_log_is_reported(monkeypatch: pytest.MonkeyPatch, problem: str | None, told: str | None):
    logged, answer = "[E:onnxruntime:Default, a.cc:1 b()] no libcublas", json.dumps({"problem": problem})
    program = f"import sys; print({logged!r}, file=sys.stderr); print({answer!r})"
    monkeypatch.setattr(ask, "_command", lambda *_: [sys.executable, "-c", program])
    assert ask.session("cuda:0") == told


def test_hung_process_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ask, "_command", lambda *_: [sys.executable, "-c", "import signal; signal.pause()"])
    monkeypatch.setattr(ask, "_SECONDS", 0.2)
    assert "no result within" in str(ask.session("cuda:0"))
