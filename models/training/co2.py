"""Train the CO₂ forecaster on the years up to 1990, or measure it on later years.

python -m unroll.models.training.co2                    train (one minute on one core), save, measure
python -m unroll.models.training.co2 --evaluate         measure the checkpoint only
python -m unroll.models.training.co2 --write-expected   write PyTorch's forecasts, for comparison with a server
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.numpy import save

from unroll.models import checkpoint, mauna_loa
from unroll.models.co2 import CHECKPOINT, CO2Forecaster, load
from unroll.models.mauna_loa import Series
from unroll.models.training.descent import descend

#: PyTorch's forecasts, for comparison with a served model where PyTorch is not installed.
EXPECTED = mauna_loa.PATH.with_name("expected.safetensors")

LAST_TRAINING_YEAR = 1990
SEED = 1
STEPS, BATCH, WEEKS = 1000, 32, 260
LEARNING_RATE, WARM_UP = 1e-2, 50
#: Training windows are shifted by a random amount from this range, in ppm: the next change depends on the season and
#: the last weeks, and the level will rise beyond that of the training years.
SHIFT = (-20.0, 40.0)
#: The number of weekly changes that the linear baseline uses: slightly more than a year.
LAGS = 60


@dataclass(frozen=True, slots=True)
class Error:
    """The error of a forecaster on held-out weeks, in ppm."""

    mean_absolute: float
    root_mean_square: float


def train(series: Series) -> CO2Forecaster:
    torch.manual_seed(SEED)
    model = CO2Forecaster().train()
    ppm = torch.from_numpy(series.ppm[: _first_held_out(series)])
    measured = torch.from_numpy(scored(series)[: len(ppm)])
    model.level.fill_(ppm.mean())
    model.spread.fill_(ppm.std())
    model.change.fill_(ppm.diff().std())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate)
    for step, (window, mask) in zip(range(1, STEPS + 1), _windows(ppm, measured), strict=False):
        error = (model(window[:, :-1]) - window[:, 1:])[mask[:, 1:]] / model.change
        loss = error.square().mean()
        descend(model, loss, optimizer, schedule)
        if step % 100 == 0:
            print(f"{step}/{STEPS}: {loss.sqrt() * model.change:.3f} ppm", flush=True)
    return model.eval()


def _learning_rate(step: int) -> float:
    """The factor on the peak rate: a linear warm-up, then a half cosine down to zero."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def _windows(ppm: torch.Tensor, measured: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield shifted parts of the series (BATCH, WEEKS + 1, 1) endlessly, with masks of scored weeks."""
    generator = np.random.default_rng(SEED)
    while True:
        starts = generator.integers(0, len(ppm) - WEEKS, (BATCH, 1))
        weeks = torch.from_numpy(starts + np.arange(WEEKS + 1))
        shift = torch.from_numpy(generator.uniform(*SHIFT, (BATCH, 1)).astype(np.float32))
        yield (ppm[weeks] + shift)[..., None], measured[weeks][..., None]


def scored(series: Series) -> np.ndarray:
    """The weeks to score, (weeks,) bool.

    Both the week and the previous one must be measured, because an interpolated value depends on the next measurement.
    """
    measured = ~series.interpolated
    fair = measured.copy()
    fair[0] = False
    fair[1:] &= measured[:-1]
    return fair


def _first_held_out(series: Series) -> int:
    return next(i for i, day in enumerate(series.dates) if day.year > LAST_TRAINING_YEAR)


@torch.inference_mode()
def forecasts(model: CO2Forecaster, series: Series) -> np.ndarray:
    """The model's forecasts for the whole series from a zero state, (weeks, 1), in the dtype of its weights."""
    ppm = torch.from_numpy(series.ppm).to(next(model.parameters()).dtype)
    return model(ppm[None, :, None])[0].numpy()


def evaluate(model: CO2Forecaster, series: Series) -> dict[str, Error]:
    """Errors on the held-out weeks, by forecaster; each one knows all weeks before the one it forecasts."""
    x = series.ppm.astype(np.float64)
    weeks = np.flatnonzero(scored(series))
    weeks = weeks[weeks >= _first_held_out(series)]
    by_name = {
        "persistence": x[weeks - 1],
        "seasonal": x[weeks - 1] + x[weeks - 52] - x[weeks - 53],
        f"linear, {LAGS} lags": x[weeks - 1] + _linear(series, weeks),
        "GRU": forecasts(model, series)[weeks - 1, 0].astype(np.float64),
    }
    errors = {name: forecast - x[weeks] for name, forecast in by_name.items()}
    return {
        name: Error(float(np.abs(error).mean()), float(np.sqrt(np.square(error).mean())))
        for name, error in errors.items()
    }


def _linear(series: Series, weeks: np.ndarray) -> np.ndarray:
    """Forecast the change to each of `weeks` from the previous LAGS changes, by least squares on the training years."""
    changes = np.diff(series.ppm.astype(np.float64))  # changes[i]: from week i to week i + 1

    def features(of: np.ndarray) -> np.ndarray:
        past = of[:, None] - 2 - np.arange(LAGS)
        return np.column_stack([changes[past], np.ones(len(of))])

    fit = np.flatnonzero(scored(series))
    fit = fit[(fit > LAGS) & (fit < _first_held_out(series))]
    coefficients, *_ = np.linalg.lstsq(features(fit), changes[fit - 1], rcond=None)
    return features(weeks) @ coefficients


def write_expected(series: Series) -> None:
    """Write `input` and PyTorch's forecasts in `float32` and `float64`, each (weeks, 1)."""
    single, double = forecasts(load(), series), forecasts(load().double(), series)
    EXPECTED.write_bytes(save({"input": series.ppm[:, None].copy(), "float32": single, "float64": double}))
    print(f"{EXPECTED}: float32 differs from float64 by {np.abs(single - double).max():.1e} ppm at most")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m unroll.models.training.co2", description=__doc__.split("\n")[0])
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint, do not train")
    parser.add_argument("--write-expected", action="store_true", help="write the checkpoint's forecasts, do not train")
    arguments = parser.parse_args()
    # One thread makes sums reproducible on a machine, and leaves the other cores free.
    torch.set_num_threads(1)
    series = mauna_loa.read()
    if arguments.write_expected:
        write_expected(series)
        return
    if not arguments.evaluate:
        model = train(series)
        checkpoint.write(CHECKPOINT, model, model.rnn.config)
    print(f"{LAST_TRAINING_YEAR + 1} to {series.dates[-1].year}      MAE     RMSE   (ppm, one week ahead)")
    for name, error in evaluate(load(), series).items():
        print(f"{name:<16}{error.mean_absolute:>5.3f}{error.root_mean_square:>9.3f}")


if __name__ == "__main__":
    main()
