"""Where the tensors of a call lie in one block of memory, and how many rows a call has. Numbers only."""

from bisect import bisect_left
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from unroll.bundle import Manifest
from unroll.service.engine.tensor_ref import TensorRef

#: Numbers of rows, and whether one failed, as `kernels.cu` has them.
INDEX, FLAG = np.dtype(np.int64), np.dtype(np.int32)

#: Tensors begin at multiples of it, as cuBLAS and cuDNN like best, and blocks end there.
_ALIGNMENT = 256

Tensor = tuple[tuple[int, ...], "np.dtype[Any]"]


class Layout:
    """tensors: shape and type of each, laid one after another; `nbytes` of all."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self.offsets: list[int] = []
        self.nbytes = 0
        for shape, dtype in tensors:
            self.offsets.append(self.nbytes)
            self.nbytes += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def views(self, block: np.ndarray) -> list[np.ndarray]:
        """The tensors in a block of bytes on the host."""
        return [
            block[offset : offset + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for offset, (shape, dtype) in zip(self.offsets, self._tensors, strict=True)
        ]

    def repeated(self, block: np.ndarray, times: int) -> list[np.ndarray]:
        """The tensors in a block of so many layouts, one after another: each (times, *shape)."""
        return [
            np.lib.stride_tricks.as_strided(view, (times, *view.shape), (self.nbytes, *view.strides))
            for view in self.views(block)
        ]

    def memories(self, block: TensorRef) -> list[TensorRef]:
        """The tensors in a block anywhere."""
        return [
            block.at(offset, shape, dtype) for offset, (shape, dtype) in zip(self.offsets, self._tensors, strict=True)
        ]


def input_tensors(manifest: Manifest, rows: int) -> list[Tensor]:
    """Of one step."""
    return [((rows, 1, *spec.shape), spec.numpy) for spec in manifest.inputs]


def output_tensors(manifest: Manifest, rows: int, steps: int = 1) -> list[Tensor]:
    return [((rows, *(steps,) * spec.time, *spec.shape), spec.numpy) for spec in manifest.outputs]


#: Rows of the calls that are captured, as far as they are needed. A GPU takes hardly longer for 64 rows than for 16.
BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)


def buckets(wanted: Sequence[int], max_batch: int) -> tuple[int, ...]:
    """Ascending; the last, and no other, has room for every batch.

    wanted: instead of BUCKETS. A single one means that a row is always computed in a call of the same size, and so to
    the same bits. Raises ValueError if none has room for `max_batch` rows.
    """
    sizes = sorted(set(wanted)) or [*(size for size in BUCKETS if size < max_batch), max_batch]
    if sizes[-1] < max_batch:
        raise ValueError(f"batches of up to {max_batch} rows do not fit the largest bucket, {sizes[-1]}")
    return tuple(sizes[: bisect_left(sizes, max_batch) + 1])


def bucket_of(sizes: Sequence[int], rows: int) -> int:
    """The smallest that has room."""
    return sizes[bisect_left(sizes, rows)]
