"""Failing rows: both engines isolate them here, so that no other row of the batch fails."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import structlog

from unroll.bundle import Manifest
from unroll.service.core.errors import EngineFailed, NonFiniteOutput, UnrollError
from unroll.service.engine.engine import BatchResult, DeviceFailed, PlainRows, Rows, Tensors

_log = structlog.get_logger(__name__)

#: Up to this many values, a dot product with themselves is cheaper than checking each, and runs in one thread.
FEW = 8192


def all_finite(array: np.ndarray) -> bool:
    """Whether the array has neither NaN nor infinity. For few values, a finite dot product proves it."""
    return (array.size <= FEW and math.isfinite(np.vdot(array, array))) or bool(np.isfinite(array).all())


def one_by_one(manifest: Manifest, run: Callable[[Rows], BatchResult], rows: Rows) -> BatchResult:
    """Run a batch; if that raises, run each row separately, so that only the faulty rows fail."""
    try:
        return run(rows)
    except DeviceFailed:
        raise
    except Exception as error:  # noqa: BLE001 a failing row must not affect the rest
        if len(rows.lens) == 1:
            name = f"{manifest.name}:{manifest.version}"
            _log.error("the model failed", model=name, steps=rows.lens[0], exc_info=error)
            failure = EngineFailed("the model failed on this input; the server's log has the reason")
            return empty_outputs(manifest, 1, rows.lens[0]), {0: failure}
    merged = empty_outputs(manifest, len(rows.lens), max(rows.lens))
    failed: dict[int, UnrollError] = {}
    for i, steps in enumerate(rows.lens):
        inputs = tuple(array[i : i + 1, :steps] for array in rows.inputs)
        single = PlainRows(inputs, [steps], [rows.sources[i]], [rows.targets[i]])
        outputs, row_failed = one_by_one(manifest, run, single)
        for target, source in zip(row(manifest, merged, i, steps), row(manifest, outputs, 0, steps), strict=True):
            target[...] = source
        if row_failed:
            failed[i] = row_failed[0]
    return merged, failed


def non_finite(
    manifest: Manifest, outputs: Tensors, lens: Sequence[int], state_out: np.ndarray | None = None
) -> dict[int, UnrollError]:
    """Return an error for each row with a non-finite new state or, without padding, non-finite outputs."""
    return {
        i: _not_finite()
        for i, steps in enumerate(lens)
        if not (
            (state_out is None or np.isfinite(state_out[i]).all())
            and all(np.isfinite(array).all() for array in row(manifest, outputs, i, steps))
        )
    }


def flagged(flags: np.ndarray) -> dict[int, UnrollError]:
    """Return an error for each flagged row, which has non-finite outputs or a non-finite new state."""
    return {int(i): _not_finite() for i in np.flatnonzero(flags)} if flags.any() else {}


def row(manifest: Manifest, outputs: Tensors, i: int, steps: int) -> Tensors:
    """Return views of one row's outputs, without the padding."""
    return tuple(
        array[i, :steps] if spec.time else array[i, ...] for spec, array in zip(manifest.outputs, outputs, strict=True)
    )


def _not_finite() -> NonFiniteOutput:
    return NonFiniteOutput("the model's output for this input is not finite")


def empty_outputs(manifest: Manifest, rows: int, steps: int) -> Tensors:
    """Return zeros, each (rows, steps, *shape), or (rows, *shape) without time."""
    return tuple(np.zeros((rows, *(steps,) * spec.time, *spec.shape), spec.numpy) for spec in manifest.outputs)
