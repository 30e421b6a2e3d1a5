"""Finds the valid range of integer inputs: the values that the model itself accepts.

PyTorch raises for an index outside its table. The graph does not: ONNX counts a negative index from the end, and some
devices accept any index. So each integer input is tried with ever larger and smaller values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from unroll.bundle.golden import Arrays
from unroll.export.errors import ExportError
from unroll.export.verification import trials
from unroll.export.verification.trials import Subject

#: The largest value to try: one that survives a cast to int32; for a static input, stored as a float in the row, one
#: that float32 holds exactly.
_LARGEST, _LARGEST_STATIC = 2**31 - 1, 2**24 - 1

#: The lowest and highest value of each element of one time step.
Bounds = tuple[Tensor, Tensor]

#: Placeholders for a missing bound.
NO_BOUNDS = np.iinfo(np.int64).min, np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class ValueRange:
    """The values that the model accepts, for each element of one time step: low <= value <= high, both int64."""

    low: np.ndarray
    high: np.ndarray

    @property
    def is_bounded(self) -> bool:
        return bool((self.low != NO_BOUNDS[0]).any() or (self.high != NO_BOUNDS[1]).any())

    def limit(self, example: np.ndarray) -> int | None:
        """The size of the table that all elements index; None if the range is not of this kind.

        Python counts a negative index from the end; negative values are refused unless the example has one.
        """
        high = int(self.high.flat[0])
        if high == NO_BOUNDS[1] or (self.high != high).any() or example.min() < 0:
            return None
        return high + 1 if np.isin(self.low, (0, -high - 1)).all() else None


def find_ranges(reference: Subject) -> dict[str, ValueRange]:
    """Find the range of each integer input, including static ones.

    Raises:
        ExportError: input, if forward accepts every value and the example holds only one, or if forward computes one
            index from several inputs.
    """
    given = reference.samples.example | reference.samples.static
    integers = {name: array for name, array in given.items() if array.dtype.kind == "i"}
    found = {}
    for name, array in integers.items():
        found[name] = _range(partial(_takes, reference), name, array, name in reference.samples.static)
        if not found[name].is_bounded and (array == array.flat[0]).all():
            raise ExportError(
                "input",
                f"the example of {name!r} holds only one value; give an example with all possible values",
            )
    bounded = {name: values for name, values in found.items() if values.is_bounded}
    for end in ("low", "high"):
        corner = {name: _within(getattr(values, end), integers[name]) for name, values in bounded.items()}
        if not _takes(reference, corner):
            raise ExportError(
                "input",
                f"forward computes one index from several values of {', '.join(map(repr, corner))}, and some that are "
                "valid one by one are out of range together; compute the index outside of the model, or clamp it",
            )
    return bounded


def _takes(reference: Subject, values: Arrays) -> bool:
    """Does forward run with these values in every time step? Inputs not named keep their trial values."""
    inputs, rows = reference.inputs(trials.RANGES), reference.begin(trials.RANGES)
    for name, array in values.items():
        if name in inputs:
            inputs[name] = np.broadcast_to(array.astype(inputs[name].dtype), inputs[name].shape)
    for spec in reference.manifest.static:
        if spec.name in values:
            rows[:, spec.offset : spec.offset + spec.size] = values[spec.name].ravel()
    try:
        reference.whole(inputs, rows)
    except ExportError:
        return False
    return True


def _range(takes: Callable[[Arrays], bool], name: str, example: np.ndarray, static: bool) -> ValueRange:
    steps = example.reshape(-1, *example.shape[1 if static else 2 :])
    most = _LARGEST_STATIC if static else _LARGEST
    first, last = (np.array(values, np.int64) for values in (steps.min(0), steps.max(0)))
    low, high = (np.full(first.shape, bound) for bound in NO_BOUNDS)
    for sign, bounds, start, ends in ((-1, low, first, (-1, -most)), (1, high, last, (most,))):
        if all(takes({name: np.full(start.shape, end)}) for end in ends):
            continue
        for place in np.ndindex(start.shape):

            def alone(value: int, start: np.ndarray = start, place: tuple[int, ...] = place) -> bool:
                tried = start.copy()
                tried[place] = value
                return takes({name: tried})

            taken = int(start[place])
            refused = next((end for end in ends if sign * end > sign * taken and not alone(end)), None)
            if refused is not None:
                bounds[place] = _last_taken(alone, taken, refused)
    return ValueRange(low, high)


def _last_taken(takes: Callable[[int], bool], taken: int, refused: int) -> int:
    """Search between an accepted and a refused value for the last accepted one."""
    step = 1 if refused > taken else -1
    while abs(step) < abs(refused - taken) and takes(taken + step):
        taken, step = taken + step, 2 * step
    refused = taken + step if abs(step) < abs(refused - taken) else refused
    while abs(refused - taken) > 1:
        middle = (taken + refused) // 2
        taken, refused = (middle, refused) if takes(middle) else (taken, middle)
    return taken


def _within(bounds: np.ndarray, example: np.ndarray) -> np.ndarray:
    """The bounds; where one is missing, a value of the example."""
    return np.where(np.isin(bounds, NO_BOUNDS), example.reshape(-1, *bounds.shape)[0], bounds)


def split_ranges(ranges: dict[str, ValueRange], reference: Subject) -> tuple[dict[str, int], dict[str, Bounds]]:
    """Split the ranges into limits for the manifest and bounds that the graph checks itself.

    Returns:
        The limits by input name; the bounds as in `StreamingModule.ranges`.
    """
    given, static = reference.samples.example | reference.samples.static, reference.manifest.static
    limits = {name: limit for name, values in ranges.items() if (limit := values.limit(given[name])) is not None}
    others = {name: values for name, values in ranges.items() if name not in limits}
    bounds = {
        name: (_as_bound(values.low, given[name].dtype), _as_bound(values.high, given[name].dtype))
        for name, values in others.items()
        if name in reference.samples.example
    }
    if any(spec.name in others for spec in static):
        row = torch.full((2, reference.manifest.state_size), torch.inf) * torch.tensor([[-1.0], [1.0]])
        for spec in static:
            if spec.name in others:
                values = others[spec.name]
                columns = np.stack([values.low.ravel(), values.high.ravel()])
                row[:, spec.offset : spec.offset + spec.size] = torch.from_numpy(columns)
        bounds["state"] = row[0], row[1]
    return limits, bounds


def _as_bound(values: np.ndarray, dtype: np.dtype) -> Tensor:
    info = np.iinfo(dtype)
    return torch.as_tensor(values.clip(info.min, info.max).astype(dtype))
