"""Makes inputs of any batch size and length that look like the example's."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from unroll.bundle import Manifest
from unroll.bundle.golden import Arrays

#: Of the values of an input that may hold NaN.
_MISSING = 0.2


@dataclass(frozen=True, slots=True)
class Samples:
    """`example`: each (batch, time, ...); `static`: each (batch, ...).

    `limits`: integer inputs are drawn from 0 <= value < limit where known.
    """

    example: Arrays
    limits: dict[str, int] = field(default_factory=dict)
    #: State rows that sequences end in, (rows, state_size): not any numbers may stand where a sum or a count does.
    reached: np.ndarray | None = None
    static: Arrays = field(default_factory=dict)

    def draw(self, batch: int, time: int, seed: int) -> Arrays:
        """Inputs (batch, time, ...): the example's own time steps in random order, jittered if they are floats."""
        rng = np.random.default_rng(seed)
        return {name: self._draw(name, array, (batch, time), rng) for name, array in self.example.items()}

    def rows(self, batch: int, manifest: Manifest, seed: int) -> np.ndarray:
        """(batch, state_size) float32: row 0 is the initial one, the others random, or reached where they must be."""
        rows = states(batch, manifest.blank_row(), seed)
        if self.reached is not None:
            chosen = np.random.default_rng(seed).integers(0, len(self.reached), batch - 1)
            for slot in manifest.state:
                if slot.kind not in {"h", "c"}:
                    columns = slice(slot.offset, slot.offset + slot.size)
                    rows[1:, columns] = self.reached[chosen, columns]
        return self._with_static(rows, manifest, seed)

    def begin(self, batch: int, manifest: Manifest, seed: int) -> np.ndarray:
        """(batch, state_size) float32: what sequences start from."""
        return self._with_static(np.repeat(manifest.blank_row()[None], batch, axis=0), manifest, seed)

    def draw_static(self, batch: int, seed: int) -> Arrays:
        """Static inputs (batch, ...), likewise."""
        rng = np.random.default_rng(seed)
        drawn = {name: self._draw(name, array[:, None], (batch, 1), rng) for name, array in self.static.items()}
        return {name: array[:, 0] for name, array in drawn.items()}

    def _with_static(self, rows: np.ndarray, manifest: Manifest, seed: int) -> np.ndarray:
        drawn = self.draw_static(len(rows), seed)
        for spec in manifest.static:
            rows[:, spec.offset : spec.offset + spec.size] = drawn[spec.name].reshape(len(rows), -1)
        return rows

    def _draw(self, name: str, array: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        shape = (*size, *array.shape[2:])
        if array.dtype == bool:
            return rng.integers(0, 2, shape).astype(bool)
        if name in self.limits:
            return rng.integers(0, self.limits[name], shape).astype(array.dtype)
        steps = array.reshape(-1, *array.shape[2:])
        chosen = steps[rng.integers(0, len(steps), size)]
        if array.dtype.kind == "i":
            return chosen
        noise = rng.standard_normal(shape)
        if (steps == steps[0]).all():
            # Nothing to shuffle: spread around the one step there is.
            jittered = chosen + noise * (float(array.std()) or 1.0)
        else:
            # Multiplied, not added: zeros stay zero and signs stay, whatever each feature's scale.
            jittered = chosen * (1 + 0.1 * noise)
        if np.isnan(array).any():  # as an input that may hold NaN does
            jittered = np.where(rng.random(shape) < _MISSING, np.nan, jittered)
        return jittered.astype(array.dtype)


def states(batch: int, initial: np.ndarray, seed: int) -> np.ndarray:
    """(batch, state_size) float32: row 0 is `initial`, the others are random and not zero."""
    rng = np.random.default_rng(seed)
    rows = rng.uniform(-0.9, 0.9, (batch, len(initial))).astype(np.float32)
    rows[0] = initial
    return rows


def as_tensors(arrays: Arrays, *, double: bool) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return {name: t.double() if double and t.is_floating_point() else t for name, t in tensors.items()}


def missing(tensor: Tensor) -> Tensor:
    """The tensor with NaN at random places, and in its last one."""
    places = torch.rand(tensor.shape) < _MISSING
    places.view(-1)[-1] = True
    return tensor.masked_fill(places, torch.nan)
