"""Proves an engine before it serves: the golden vectors, step by step, in calls of every size."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unroll.bundle import GoldenMismatch, Manifest
from unroll.bundle.golden import Arrays, Golden
from unroll.bundle.verification import Differences, check_golden, difference, join_chunks, largest, select_rows
from unroll.service.engine.engine import Engine, PlainRows
from unroll.service.state.slots import FIRST


@dataclass(frozen=True, slots=True)
class Proof:
    """The differences that were measured.

    Attributes:
        parity: Largest differences from PyTorch in float64, by output and `state_out`.
        stability: Largest difference of one row's outputs and state between calls of different sizes, or of the same
            size with other rows; 0.0 if no bit differs.
    """

    parity: Differences
    stability: float


def prove_steps(
    engine: Engine, manifest: Manifest, golden: Golden, sizes: Sequence[int], rows: int, slack: float
) -> Proof:
    """Run the golden sequences step by step.

    Args:
        engine: The engine. Its last rows are overwritten.
        sizes: Rows of the calls to try; none for a model that cannot be streamed.
        rows: Rows of the engine's arena; larger calls are not tried.
        slack: How many times the manifest's tolerance an answer may be off.

    Raises:
        GoldenMismatch: A difference exceeds that.
    """
    parity: list[Differences] = []
    stability = 0.0
    reference: Arrays | None = None
    for size in sorted({min(size, rows - FIRST) for size in sizes}):
        found = _run_steps(engine, manifest, golden, size, rows - size)
        count = min(size, len(golden.state))
        found_first = select_rows(found, slice(count))
        parity.append(check_golden(found_first, golden.first(count), manifest, f"in calls of {size} rows", slack))
        reference = reference or select_rows(found, slice(1))
        first_sequence = select_rows(found, slice(None, None, len(golden.state)))  # in every row that holds it
        for name, array in first_sequence.items():
            stability = max(stability, difference(array, np.broadcast_to(reference[name], array.shape)))
    return Proof(largest(parity), stability)


def _run_steps(engine: Engine, manifest: Manifest, golden: Golden, size: int, first: int) -> Arrays:
    """Run the golden sequences, repeated to fill `size` rows, in the slots from `first` on.

    Returns:
        The outputs and `state_out`.
    """
    which = np.arange(size) % len(golden.state)
    slots = list(range(first, first + size))
    for slot, row in zip(slots, which, strict=True):
        engine.write(slot, golden.state[row])
    inputs = [golden.inputs[spec.name][which] for spec in manifest.inputs]
    names = [spec.name for spec in manifest.outputs]
    steps: list[Arrays] = []
    for t in range(golden.time):
        rows = PlainRows(tuple(array[:, t : t + 1] for array in inputs), [1] * size, slots, slots)
        outputs, failed = engine.run(rows)
        if failed:
            raise GoldenMismatch(f"{failed[min(failed)].message} (a golden sequence in calls of {size} rows)")
        steps.append(dict(zip(names, outputs, strict=True)))
    return join_chunks(steps, manifest) | {"state_out": np.stack([engine.read(slot) for slot in slots])}
