"""The demo runs against a real server and has a message for each failure."""

import io
import json
import shutil
import socket
import subprocess
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from unroll import Client, cli
from unroll.client.plot import bars
from unroll.examples import demo
from unroll.examples.display import Live


@pytest.fixture(scope="module")
def example() -> demo.Example:
    return demo.Example.read(demo.EXAMPLE)


def test_every_week_through_one_session_equals_pytorch(server: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["demo", "--url", server]) == 0
    out = capsys.readouterr().out
    assert "2284 weeks through one session, 2284 of them one request each" in out
    assert "yes, bit for bit" in out
    assert "same answer, applied once" in out


def test_quick_demo_sends_the_first_weeks_at_once_and_prints_json(server: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["demo", "--url", server, "--quick", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "2284 weeks through one session, 520 of them one request each" in err
    assert "yes, bit for bit" in err
    found = json.loads(out)
    assert (found["weeks"], found["single_steps"], found["faults"]) == (2284, 520, [])
    assert found["differences"] == {"Streamed = whole": 0.0}
    assert found["float64_difference"] <= found["tolerance"]
    assert found["mean_absolute_error"] < found["persistence_error"]


def test_demo_leaves_no_session_behind(server: str):
    with Client(server) as client:
        before = client.models()[-1].description["sessions"]
        assert cli.main(["demo", "--url", server, "--quick"]) == 0
        assert client.models()[-1].description["sessions"] == before


@pytest.mark.usefixtures("_curl")
def test_the_printed_commands_work_as_pasted(server: str):
    script = demo.commands(server)
    for _ in range(2):
        pasted = subprocess.run(["bash", "-e"], input=script, capture_output=True, text=True, check=True)
        opened, stepped, info, whole, resumed, metadata = map(json.loads, pasted.stdout.splitlines())
        assert opened["position"] == 0
        assert stepped["position"] == info["position"] == resumed["position"] == 2
        assert whole["outputs"] == [stepped["outputs"]]
        assert metadata["inputs"][0]["name"] == "ppm"
        script = demo.commands(server)  # opens another session


def test_missing_server_is_reported(capsys: pytest.CaptureFixture[str]):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening
        assert cli.main(["demo", "--url", f"http://127.0.0.1:{unused.getsockname()[1]}"]) == 1
    assert "make run" in capsys.readouterr().err


def test_invalid_address_is_reported(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["demo", "--url", "localhost:8000"]) == 1
    assert "is not the URL of a server" in capsys.readouterr().err


def test_forecasts_that_are_not_pytorchs_are_a_failure(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    expected = load((demo.EXAMPLE / "expected.safetensors").read_bytes())
    expected["float64"] += 0.001
    expected["float32"] += np.float32(0.001)
    shutil.copy(demo.EXAMPLE / "co2.csv", tmp_path)
    (tmp_path / "expected.safetensors").write_bytes(save(expected))
    assert cli.main(["demo", "--url", server, "--quick", "--example", str(tmp_path)]) == 1
    assert "differ from PyTorch by 1.0e-03 ppm" in capsys.readouterr().err


def test_incomplete_example_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["demo", "--example", str(tmp_path)]) == 1
    assert "is not a folder of the example" in capsys.readouterr().err


def test_example_with_other_measurements_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    expected = load((demo.EXAMPLE / "expected.safetensors").read_bytes())
    expected["input"][7] += 1
    shutil.copy(demo.EXAMPLE / "co2.csv", tmp_path)
    (tmp_path / "expected.safetensors").write_bytes(save(expected))
    assert cli.main(["demo", "--example", str(tmp_path)]) == 1
    assert "does not match co2.csv" in capsys.readouterr().err


@pytest.mark.parametrize(("exact", "last_bits", "faults"), [(True, 1, 1), (False, 1, 0), (False, 1000, 1)])
def test_streamed_and_whole_must_agree(example: demo.Example, exact: bool, last_bits: int, faults: int):
    """They agree bit for bit if the model guarantees it, otherwise within rounding."""
    whole = example.float32.copy()
    whole[-1] += last_bits * np.spacing(whole[-1])
    streamed = demo.Streamed(example.float32, singles=1, seconds=1.0)
    assert len(demo.compare(example, streamed, {"Streamed = whole": whole}, exact=exact).faults) == faults


def test_a_forecast_that_is_not_a_number_is_a_failure(example: demo.Example):
    broken = example.float32.copy()
    broken[0] = np.nan
    found = demo.compare(example, demo.Streamed(broken, 1, 1.0), {"Streamed = whole": broken}, exact=True)
    assert len(found.faults) == 2


def test_judged_weeks_were_measured_and_so_was_the_week_before(example: demo.Example):
    for week in example.judged():
        assert example.series.dates[week].year > demo.LAST_TRAINING_YEAR
        assert not example.series.interpolated[week - 1 : week + 1].any()


def test_the_live_display_is_drawn_in_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "20")
    truth = np.linspace(300, 330, 31, dtype=np.float32)
    dates = [date(2000, 1, 1) + timedelta(weeks=i) for i in range(31)]
    out = io.StringIO()
    live = Live(out, dates, truth)
    for week in range(1, 31):
        live.show(week, truth)
    first, *frames = out.getvalue().split("\x1b[3A")
    assert first == "\n\n\n"
    assert 1 <= len(frames) <= 30
    assert "2000-07-29  measured 330.00  forecast 329.00  error -1.00 ppm" in frames[-1]
    assert "measured  ▂▃▄▅▅▆▇█" in frames[-1]
    live.note("a note")
    assert out.getvalue().endswith("▇\na note\n\n\n")


def test_bars_are_scaled_to_the_range():
    assert bars(np.array([0.0, 5.0, 10.0]), 0.0, 10.0) == "▁▅█"
    assert bars(np.array([3.0, 3.0]), 3.0, 3.0) == "▁▁"
