"""Golden vectors of the running-sum model."""

import numpy as np
import pytest
from sum_model import run

from unroll.bundle import Golden


@pytest.fixture
def golden() -> Golden:
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((2, 6, 3), np.float32), "token": rng.integers(0, 5, (2, 6))}
    state = rng.standard_normal((2, 3), np.float32)
    outputs, after = run(
        {"x": inputs["x"].astype(np.float64), "token": inputs["token"]}, state.astype(np.float64), None
    )
    return Golden(inputs, state, outputs, after, ((6,), (1, 1, 1, 1, 1, 1), (2, 3, 1)))
