"""A tensor by its address: onnxruntime is bound to it, on the host or on a device."""

from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor's address, shape and type. It does not own the memory: the allocator keeps it alive.

    Attributes:
        device_type: onnxruntime's name of the device, `cpu` or `cuda`.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device_type: str = "cpu"
    device_index: int = 0

    @classmethod
    def of(cls, array: np.ndarray) -> Self:
        return cls(array.ctypes.data, array.shape, array.dtype)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def at(self, offset: int, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> "TensorRef":
        """Refer to a tensor inside this one, starting `offset` bytes after its beginning."""
        return TensorRef(self.pointer + offset, shape, dtype, self.device_type, self.device_index)
