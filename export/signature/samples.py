"""Makes inputs of any batch size and length that resemble the example's."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from unroll.bundle import Manifest
from unroll.bundle.golden import Arrays

#: The share of NaN in an input that allows it.
_MISSING = 0.2


@dataclass(frozen=True, slots=True)
class Samples:
    """Draws inputs and state rows for trials.

    Attributes:
        example: the inputs, each (batch, time, ...).
        limits: the range of integer inputs where known: 0 <= value < limit.
        reached: state rows (rows, state_size) that sequences end in, since sums and counts cannot hold any number.
        static: the static inputs, each (batch, ...).
    """

    example: Arrays
    limits: dict[str, int] = field(default_factory=dict)
    reached: np.ndarray | None = None
    static: Arrays = field(default_factory=dict)

    def draw(self, batch: int, time: int, seed: int) -> Arrays:
        """Draw inputs (batch, time, ...): the example's time steps in random order, with jitter for floats."""
        rng = np.random.default_rng(seed)
        return {name: self._draw(name, array, (batch, time), rng) for name, array in self.example.items()}

    def rows(self, batch: int, manifest: Manifest, seed: int) -> np.ndarray:
        """Draw state rows (batch, state_size) float32: row 0 is initial, others are random or from `reached`."""
        rows = states(batch, manifest.blank_row(), seed)
        if self.reached is not None:
            chosen = np.random.default_rng(seed).integers(0, len(self.reached), batch - 1)
            for slot in manifest.state:
                if slot.kind not in {"h", "c"}:
                    columns = slice(slot.offset, slot.offset + slot.size)
                    rows[1:, columns] = self.reached[chosen, columns]
        return self._with_static(rows, manifest, seed)

    def begin(self, batch: int, manifest: Manifest, seed: int) -> np.ndarray:
        """Initial state rows (batch, state_size) float32."""
        return self._with_static(np.repeat(manifest.blank_row()[None], batch, axis=0), manifest, seed)

    def draw_static(self, batch: int, seed: int) -> Arrays:
        """Draw static inputs (batch, ...) likewise."""
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
            # All steps are equal: spread around them.
            jittered = chosen + noise * (float(array.std()) or 1.0)
        else:
            # Multiplicative noise keeps zeros and signs, whatever a feature's scale.
            jittered = chosen * (1 + 0.1 * noise)
        if np.isnan(array).any():  # the input allows NaN
            jittered = np.where(rng.random(shape) < _MISSING, np.nan, jittered)
        return jittered.astype(array.dtype)


def states(batch: int, initial: np.ndarray, seed: int) -> np.ndarray:
    """State rows (batch, state_size) float32: row 0 is `initial`, the others are random and not zero."""
    rng = np.random.default_rng(seed)
    rows = rng.uniform(-0.9, 0.9, (batch, len(initial))).astype(np.float32)
    rows[0] = initial
    return rows


def as_tensors(arrays: Arrays, *, double: bool) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return {name: t.double() if double and t.is_floating_point() else t for name, t in tensors.items()}


def missing(tensor: Tensor) -> Tensor:
    """Replace random elements, and always the last one, by NaN."""
    places = torch.rand(tensor.shape) < _MISSING
    places.view(-1)[-1] = True
    return tensor.masked_fill(places, torch.nan)
