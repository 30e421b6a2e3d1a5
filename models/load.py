"""Curves of processor load for the forecaster, and where its checkpoint is.

Needs NumPy only, so that examples can make a curve where there is no torch.
"""

from pathlib import Path

import numpy as np

CHECKPOINT = Path(__file__).parent / "checkpoints" / "load"


def curve(generator: np.random.Generator, readings: int) -> np.ndarray:
    """A calm machine: a level that drifts, noise, and at times a job that returns. (readings,) float32 in 0 … 1."""
    level, drift = generator.uniform(0.03, 0.6), generator.normal(0, 0.004, readings).cumsum()
    load = level + drift + generator.normal(0, generator.uniform(0.005, 0.03), readings)
    if generator.random() < 0.5:
        period = generator.integers(4, 10)
        busy = (np.arange(readings) + generator.integers(period)) % period < generator.integers(1, 4)
        load += busy * generator.uniform(0.15, 0.4)
    return np.clip(load, 0, 1).astype(np.float32)


def calm_then_burst(readings: int = 240, start: int = 180, length: int = 20) -> np.ndarray:
    """The same curve in every run: calm, and a burst that nothing announces."""
    generator = np.random.default_rng(7)
    load = 0.2 + generator.normal(0, 0.015, readings)
    load[start : start + length] += 0.7
    return np.clip(load, 0, 1).astype(np.float32)
