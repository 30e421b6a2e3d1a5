"""What is shown of a model on its device before it is served: golden vectors, step by step, in every size of call."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unroll.bundle import Manifest
from unroll.bundle.golden import Arrays, Golden, GoldenMismatch, differences
from unroll.service.engine.engine import Engine, PlainRows
from unroll.service.state.slots import FIRST


@dataclass(frozen=True, slots=True)
class Proof:
    """parity: largest absolute differences from PyTorch float64, by output and `state_out`.

    stability: largest absolute difference of a row's outputs and state between calls of different sizes, or of the same
    size and other company; 0.0 if not a bit differs.
    """

    parity: dict[str, float]
    stability: float


def prove_steps(
    engine: Engine, manifest: Manifest, golden: Golden, sizes: Sequence[int], rows: int, slack: float
) -> Proof:
    """Calls of each of `sizes`, if it has so many rows, on the last of the arena's `rows`.

    Raises GoldenMismatch if a difference exceeds `slack` times the manifest's tolerance.
    """
    parity: dict[str, float] = {}  # empty without sizes, of a model that takes no steps
    stability = 0.0
    reference: Arrays | None = None
    for size in sorted({min(size, rows - FIRST) for size in sizes}):
        found = _run(engine, manifest, golden, size, rows - size)
        count = min(size, len(golden.state))
        alone = _rows(golden, count)
        for name, worst in differences(
            alone, manifest, _first(found, count), f"in calls of {size} rows", slack
        ).items():
            parity[name] = max(parity.get(name, 0.0), worst)
        reference = reference or _first(found, 1)
        repeated = slice(None, None, len(golden.state))  # the first golden row, wherever it stands
        stability = max(
            stability, *(float(np.max(np.abs(array[repeated] - reference[name]))) for name, array in found.items())
        )
    return Proof(parity, stability)


def _run(engine: Engine, manifest: Manifest, golden: Golden, size: int, first: int) -> Arrays:
    """Outputs and `state_out` of the golden sequences, repeated to fill the call, one step after another."""
    which = np.arange(size) % len(golden.state)
    slots = list(range(first, first + size))
    for slot, row in zip(slots, which, strict=True):
        engine.write(slot, golden.state[row])
    inputs = [golden.inputs[spec.name][which] for spec in manifest.inputs]
    steps: list[tuple[np.ndarray, ...]] = []
    for t in range(inputs[0].shape[1]):
        rows = PlainRows(tuple(array[:, t : t + 1] for array in inputs), [1] * size, slots, slots)
        outputs, failed = engine.run(rows)
        if failed:
            raise GoldenMismatch(f"{failed[min(failed)].message} (a golden sequence in calls of {size} rows)")
        steps.append(outputs)
    found = {
        spec.name: np.concatenate(parts, axis=1) if spec.time else parts[-1]
        for spec, parts in zip(manifest.outputs, zip(*steps, strict=True), strict=True)
    }
    return found | {"state_out": np.stack([engine.read(slot) for slot in slots])}


def _rows(golden: Golden, count: int) -> Golden:
    """Its first sequences."""
    return Golden(
        {name: array[:count] for name, array in golden.inputs.items()},
        golden.state[:count],
        {name: array[:count] for name, array in golden.outputs.items()},
        golden.state_out[:count],
        golden.chunkings,
    )


def _first(arrays: Arrays, count: int) -> Arrays:
    return {name: array[:count] for name, array in arrays.items()}
