"""Valid inputs for a model."""

import numpy as np

from unroll import bundle


def random_inputs(manifest: bundle.Manifest, rng: np.random.Generator, steps: int) -> tuple[np.ndarray, ...]:
    """Return random inputs, each (steps, *shape)."""
    return tuple(
        rng.integers(0, spec.limit or 2, (steps, *spec.shape)).astype(spec.numpy)
        if spec.limit
        else rng.standard_normal((steps, *spec.shape)).astype(spec.numpy)
        for spec in manifest.inputs
    )
