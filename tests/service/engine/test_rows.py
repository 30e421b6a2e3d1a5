"""Answers are checked for NaN and infinity, for every dtype and number of outputs."""

import numpy as np
import pytest

from unroll.service.engine.rows import FEW, all_finite


@pytest.mark.parametrize("count", [1, FEW, FEW + 1])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_largest_values_are_finite_and_one_that_is_not_is_found(count: int, dtype: str) -> None:
    values = np.full((count, 1), np.finfo(dtype).max, dtype)
    assert all_finite(values)
    for bad in (np.nan, np.inf, -np.inf):
        values[-1] = bad
        assert not all_finite(values)


@pytest.mark.parametrize("values", [np.full((3, 1), 2**62), np.array([[True, False]]), np.zeros((0, 3), np.float32)])
def test_integers_flags_and_nothing_are_finite(values: np.ndarray) -> None:
    assert all_finite(values)
