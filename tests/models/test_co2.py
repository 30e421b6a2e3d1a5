"""The CO₂ series as committed, and the forecaster trained on it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from unroll.models import mauna_loa
from unroll.models.checkpoint import CheckpointError
from unroll.models.co2 import CHECKPOINT, CO2Forecaster, load
from unroll.models.mauna_loa import Series
from unroll.models.training import co2


@pytest.fixture(scope="module")
def series() -> Series:
    return mauna_loa.read()


@pytest.fixture(scope="module")
def model() -> CO2Forecaster:
    return load()


def test_series_has_every_week_once(series: Series) -> None:
    assert len(series.dates) == len(series.ppm) == len(series.interpolated) == 2284
    assert {(b - a).days for a, b in zip(series.dates, series.dates[1:], strict=False)} == {7}
    assert series.interpolated.sum() == 59
    assert 310 < series.ppm.min() < series.ppm.max() < 380


def test_interpolated_weeks_lie_on_the_line_between_their_neighbours(series: Series) -> None:
    weeks, measured = np.arange(len(series.ppm)), ~series.interpolated
    line = np.interp(weeks, weeks[measured], series.ppm[measured])
    np.testing.assert_allclose(series.ppm, line, rtol=0, atol=6e-4)  # the file has three decimals


def test_file_equals_the_statsmodels_data() -> None:
    pytest.importorskip("statsmodels")
    from unroll.models.training.mauna_loa import csv_text

    assert mauna_loa.PATH.read_text() == csv_text()


def test_forecast_is_scored_only_if_no_interpolated_week_reveals_it(series: Series) -> None:
    scored = co2.scored(series)
    assert not scored[0]
    for week in np.flatnonzero(series.interpolated):
        assert not scored[week : week + 2].any()
    assert scored.sum() > 2100


def test_beats_every_baseline_on_held_out_years(model: CO2Forecaster, series: Series) -> None:
    errors = co2.evaluate(model, series)
    gru = errors.pop("GRU")
    for name, error in errors.items():
        assert gru.mean_absolute < error.mean_absolute, name
        assert gru.root_mean_square < error.root_mean_square, name


def test_baselines_forecast_as_defined() -> None:
    """In a season that repeats exactly, the seasonal baseline makes no error, but persistence does."""
    weeks = np.arange(2284)
    ppm = (330 + weeks / 32 + np.sin(2 * np.pi * weeks / 52)).astype(np.float32)
    made = Series(mauna_loa.read().dates, ppm, np.zeros(len(weeks), bool))
    errors = co2.evaluate(load(), made)
    assert errors["seasonal"].root_mean_square < 1e-4
    assert errors["linear, 60 lags"].root_mean_square < 1e-3
    assert 0.03 < errors["persistence"].mean_absolute < 0.2


def test_forecast_does_not_use_future_weeks(model: CO2Forecaster, series: Series) -> None:
    ppm = torch.from_numpy(series.ppm[:100, None])[None]
    changed = ppm.clone()
    changed[:, 60:] += 5
    with torch.inference_mode():
        torch.testing.assert_close(model(ppm)[:, :60], model(changed)[:, :60])


def test_expected_forecasts_are_the_checkpoints(model: CO2Forecaster, series: Series) -> None:
    expected = load_file(co2.EXPECTED)
    assert {name: (array.shape, array.dtype.name) for name, array in expected.items()} == {
        "input": ((2284, 1), "float32"),
        "float32": ((2284, 1), "float32"),
        "float64": ((2284, 1), "float64"),
    }
    np.testing.assert_array_equal(expected["input"][:, 0], series.ppm)
    np.testing.assert_allclose(expected["float64"], co2.forecasts(load().double(), series), rtol=0, atol=1e-9)
    # One unit in the last place of a float32 near 350 is 3e-5 ppm.
    np.testing.assert_allclose(expected["float32"], co2.forecasts(model, series), rtol=0, atol=1e-4)
    np.testing.assert_allclose(expected["float32"], expected["float64"], rtol=0, atol=1e-4)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    for suffix in (".json", ".safetensors"):
        shutil.copy(CHECKPOINT.with_suffix(suffix), tmp_path)
    text = (tmp_path / "co2.json").read_text()
    (tmp_path / "co2.json").write_text(text.replace('"hidden_size": 16', '"hidden_size": 8'))
    with pytest.raises(CheckpointError, match="another configuration"):
        load(tmp_path / "co2")


@pytest.mark.parametrize("name", ["bytes", "co2", "load", "policy", "sound"])
def test_checkpoints_stay_small(name: str) -> None:
    stem = CHECKPOINT.with_name(name)
    assert sum(stem.with_suffix(suffix).stat().st_size for suffix in (".json", ".safetensors")) < 1_000_000
