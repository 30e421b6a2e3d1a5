"""Weekly atmospheric CO₂ at Mauna Loa, 1958 to 2001: reads `examples/co2/co2.csv`, which names its source.

Imports neither torch nor statsmodels.
"""

import csv
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

PATH = Path(__file__).parents[1] / "examples" / "co2" / "co2.csv"


@dataclass(frozen=True, slots=True)
class Series:
    """Weekly values without gaps."""

    dates: tuple[date, ...]
    ppm: np.ndarray  # (weeks,) float32
    interpolated: np.ndarray  # (weeks,) bool: True if the week has no measurement


def read(path: Path = PATH) -> Series:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return Series(
        dates=tuple(date.fromisoformat(row["date"]) for row in rows),
        ppm=np.array([row["ppm"] for row in rows], np.float32),
        interpolated=np.array([row["interpolated"] == "1" for row in rows]),
    )
