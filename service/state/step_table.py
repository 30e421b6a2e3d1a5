"""The step table keeps the inputs and outputs of each session's last single step, to answer retries."""

from collections.abc import Sequence

import numpy as np

from unroll.bundle import TensorSpec

Tensors = tuple[np.ndarray, ...]

#: A table of larger steps would be mostly empty; sessions keep those individually.
MAX_STEP_BYTES = 4096


class StepTable:
    """Matrices with one row per arena row, so that a batch is written with one copy per tensor.

    The operating system allocates a row's memory when it is first written.
    """

    def __init__(self, rows: int, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self._inputs = [_Tensor(rows, (1, *spec.shape), spec) for spec in inputs]
        self._outputs = [_Tensor(rows, (*(1,) * spec.time, *spec.shape), spec) for spec in outputs]

    @staticmethod
    def fits(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
        return sum(spec.nbytes for spec in (*inputs, *outputs)) <= MAX_STEP_BYTES

    def write(self, slots: Sequence[int] | np.ndarray, inputs: Tensors, outputs: Tensors) -> None:
        """Write one step per session.

        Args:
            inputs: Each (len(slots), 1, *shape).
            outputs: Each (len(slots), 1, *shape), or (len(slots), *shape) without time.
        """
        for tensor, rows in zip(self._inputs, inputs, strict=True):
            tensor.put(slots, rows)
        for tensor, rows in zip(self._outputs, outputs, strict=True):
            tensor.put(slots, rows)

    def inputs(self, slot: int) -> Tensors:
        """Views of the inputs in this row, each (1, *shape)."""
        return tuple(tensor.rows[slot] for tensor in self._inputs)

    def outputs(self, slot: int) -> Tensors:
        """Copies of the outputs in this row, each (1, *shape), or (*shape) without time."""
        return tuple(tensor.rows[slot].copy() for tensor in self._outputs)


class _Tensor:
    """One tensor's rows, as values and as opaque items, which NumPy copies in half the time."""

    def __init__(self, count: int, shape: tuple[int, ...], spec: TensorSpec) -> None:
        self.rows = np.zeros((count, *shape), spec.numpy)
        self._item = np.dtype((np.void, spec.nbytes))
        self._items = self.rows.reshape(count, spec.size).view(self._item)[:, 0]

    def put(self, slots: Sequence[int] | np.ndarray, rows: np.ndarray) -> None:
        self._items[slots] = np.frombuffer(np.ascontiguousarray(rows), self._item)
