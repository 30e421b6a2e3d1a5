"""Draws inputs that resemble an example's."""

import numpy as np

from conformance.oracle import Arrays, DrawInputs
from unroll.bundle import Manifest
from unroll.export.signature.samples import Samples


def like(example: Arrays, static: Arrays, manifest: Manifest) -> DrawInputs:
    """Make a function that draws inputs like `example` (batch, time, ...), and rows of `static` (batch, ...)."""
    samples = Samples(example, {spec.name: spec.limit for spec in manifest.inputs if spec.limit is not None})

    def draw(batch: int, time: int, rng: np.random.Generator) -> Arrays:
        series = samples.draw(batch, time, int(rng.integers(2**31)))
        return series | {name: array[rng.integers(0, len(array), batch)] for name, array in static.items()}

    return draw
