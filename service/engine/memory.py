"""A tensor by its address: what onnxruntime is bound to, on the host or on a device."""

from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np


@dataclass(frozen=True, slots=True)
class Memory:
    """place, index: onnxruntime's words for where it is: (`cpu`, 0), (`cuda`, 1). Whoever made it keeps it alive."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    place: str = "cpu"
    index: int = 0

    @classmethod
    def of(cls, array: np.ndarray) -> Self:
        return cls(array.ctypes.data, array.shape, array.dtype)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def at(self, offset: int, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> "Memory":
        """A tensor inside this one's bytes, `offset` bytes from its beginning."""
        return Memory(self.pointer + offset, shape, dtype, self.place, self.index)
