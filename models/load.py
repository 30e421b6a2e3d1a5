"""Synthetic curves of processor load for the forecaster, and the path of its checkpoint.

Needs only NumPy, so that examples run without torch.
"""

from pathlib import Path

import numpy as np

CHECKPOINT = Path(__file__).parent / "checkpoints" / "load"


def curve(generator: np.random.Generator, readings: int) -> np.ndarray:
    """The load of a calm machine, (readings,) float32 in 0 … 1: drift, noise, and sometimes a periodic job."""
    level, drift = generator.uniform(0.03, 0.6), generator.normal(0, 0.004, readings).cumsum()
    load = level + drift + generator.normal(0, generator.uniform(0.005, 0.03), readings)
    if generator.random() < 0.5:
        period = generator.integers(4, 10)
        busy = (np.arange(readings) + generator.integers(period)) % period < generator.integers(1, 4)
        load += busy * generator.uniform(0.15, 0.4)
    return np.clip(load, 0, 1).astype(np.float32)


def calm_then_burst(readings: int = 240, start: int = 180, length: int = 20) -> np.ndarray:
    """A fixed curve: a calm machine with one unexpected burst."""
    generator = np.random.default_rng(7)
    load = 0.2 + generator.normal(0, 0.015, readings)
    load[start : start + length] += 0.7
    return np.clip(load, 0, 1).astype(np.float32)
