"""The processor-load example program against a real server."""

import re
from pathlib import Path

import pytest

from unroll.examples import load
from unroll.models.load import calm_then_burst

BURST = range(181, 201)  # readings, counted from 1


def test_burst_raises_an_alarm_and_calm_before_it_raises_none(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "load.csv"
    file.write_text("load\n" + "".join(f"{reading}\n" for reading in calm_then_burst()))
    assert load.main([str(file), "--url", server]) == 0
    *alarms, summary = capsys.readouterr().out.splitlines()
    numbers = [int(re.match(r"reading (\d+): load \d+%, forecast \d+%, threshold \d+%$", line)[1]) for line in alarms]
    assert numbers[0] == BURST[0]
    assert all(number in BURST or number <= BURST[-1] + 3 for number in numbers), "the calm after it"
    assert summary == f"240 readings, {len(alarms)} alarms"


def test_file_without_readings_is_refused_with_the_line(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "load.csv"
    for text, reason in (
        ("load\n0.5\n95\n", "line 3: load is '95'; give a number from 0 to 1"),
        ("a\n1\n", "no column 'load'"),
        ("load\n", "there was no reading"),
    ):
        file.write_text(text)
        assert load.main([str(file), "--url", server]) == 1
        assert reason in capsys.readouterr().err


def test_program_reads_the_cpu_counters(server: str, capsys: pytest.CaptureFixture[str]):
    if not load.PROC_STAT.exists():
        pytest.skip("only Linux has /proc/stat")
    assert load.main(["--seconds", "0.4", "--rate", "5", "--url", server]) == 0
    assert capsys.readouterr().out == "2 readings, 0 alarms\n"


def test_program_without_cpu_counters_asks_for_a_recording(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(load, "PROC_STAT", tmp_path / "stat")
    assert load.main(["--url", server]) == 1
    assert "Give a recording, FILE.csv, instead." in capsys.readouterr().err
    (tmp_path / "stat").write_text("cpu  10 1 4 80 5 0 0 0 0 0\ncpu0 1 1 1 1\n")
    assert load.processor_time() == (15, 100)
