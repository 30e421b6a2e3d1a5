"""Offsets of a call's tensors in one block of memory, and the row counts of captured calls."""

from bisect import bisect_left
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from unroll.bundle import Manifest
from unroll.service.engine.tensor_ref import TensorRef

#: Types of row numbers and of failure flags in `kernels.cu`.
INDEX, FLAG = np.dtype(np.int64), np.dtype(np.int32)

#: Tensors begin and blocks end at multiples of this many bytes, which is fastest for cuBLAS and cuDNN.
_ALIGNMENT = 256

Tensor = tuple[tuple[int, ...], "np.dtype[Any]"]


class BlockLayout:
    """Tensors one after another in a block. offsets: First byte of each tensor."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self.offsets: list[int] = []
        self.nbytes = 0
        for shape, dtype in tensors:
            self.offsets.append(self.nbytes)
            self.nbytes += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def views(self, block: np.ndarray) -> list[np.ndarray]:
        """Return the tensors in a block of bytes on the host."""
        return [
            block[offset : offset + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for offset, (shape, dtype) in zip(self.offsets, self._tensors, strict=True)
        ]

    def repeated(self, block: np.ndarray, times: int) -> list[np.ndarray]:
        """Return the tensors in `times` such blocks, one after another: each (times, *shape)."""
        return [
            np.lib.stride_tricks.as_strided(view, (times, *view.shape), (self.nbytes, *view.strides))
            for view in self.views(block)
        ]

    def memories(self, block: TensorRef) -> list[TensorRef]:
        """Return references to the tensors in a block on any device."""
        return [
            block.at(offset, shape, dtype) for offset, (shape, dtype) in zip(self.offsets, self._tensors, strict=True)
        ]


def input_tensors(manifest: Manifest, rows: int) -> list[Tensor]:
    return [((rows, 1, *spec.shape), spec.numpy) for spec in manifest.inputs]


def output_tensors(manifest: Manifest, rows: int, steps: int = 1) -> list[Tensor]:
    return [((rows, *(steps,) * spec.time, *spec.shape), spec.numpy) for spec in manifest.outputs]


#: Row counts of captured calls, up to the largest batch. On a GPU, 64 rows take hardly longer than 16.
BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)


def buckets(wanted: Sequence[int], max_batch: int) -> tuple[int, ...]:
    """Return the row counts of captured calls, ascending; only the last has room for every batch.

    Args:
        wanted: Row counts instead of BUCKETS. With a single one, a row is always computed in a call of the same size,
            and so gives the same bits.

    Raises:
        ValueError: None has room for `max_batch` rows.
    """
    sizes = sorted(set(wanted)) or [*(size for size in BUCKETS if size < max_batch), max_batch]
    if sizes[-1] < max_batch:
        raise ValueError(f"batches of up to {max_batch} rows do not fit the largest bucket, {sizes[-1]}")
    return tuple(sizes[: bisect_left(sizes, max_batch) + 1])


def bucket_of(sizes: Sequence[int], rows: int) -> int:
    return sizes[bisect_left(sizes, rows)]
