"""The last single step of each session: what it was given and what was answered, so that a retry gets it again."""

from collections.abc import Sequence

import numpy as np

from unroll.bundle import TensorSpec

Tensors = tuple[np.ndarray, ...]

#: Larger steps are kept by their sessions one by one: a table for all of them would be mostly empty.
MAX_STEP_BYTES = 4096


class LastSteps:
    """Matrices with a row per session, as the arena is for states: a batch is kept in one copy per tensor.

    The memory is the operating system's until a row is first written.
    """

    def __init__(self, rows: int, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self._inputs = [_Table(rows, (1, *spec.shape), spec) for spec in inputs]
        self._outputs = [_Table(rows, (*(1,) * spec.time, *spec.shape), spec) for spec in outputs]

    @staticmethod
    def fits(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
        return sum(spec.nbytes for spec in (*inputs, *outputs)) <= MAX_STEP_BYTES

    def keep(self, slots: Sequence[int] | np.ndarray, inputs: Tensors, outputs: Tensors) -> None:
        """inputs: each (len(slots), 1, *shape); outputs: the same, or (len(slots), *shape) without time."""
        for table, rows in zip(self._inputs, inputs, strict=True):
            table.put(slots, rows)
        for table, rows in zip(self._outputs, outputs, strict=True):
            table.put(slots, rows)

    def payload(self, slot: int) -> Tensors:
        """What the session in this row was given: each (1, *shape)."""
        return tuple(table.rows[slot] for table in self._inputs)

    def answer(self, slot: int) -> Tensors:
        """What it was answered: each (1, *shape), or (*shape) without time."""
        return tuple(table.rows[slot].copy() for table in self._outputs)


class _Table:
    """One tensor's rows: as values, and as what is copied whole, which NumPy does in half the time."""

    def __init__(self, count: int, shape: tuple[int, ...], spec: TensorSpec) -> None:
        self.rows = np.zeros((count, *shape), spec.numpy)
        self._size, self._whole = spec.size, np.dtype((np.void, spec.nbytes))
        self._flat = self.rows.reshape(count, spec.size).view(self._whole)[:, 0]

    def put(self, slots: Sequence[int] | np.ndarray, rows: np.ndarray) -> None:
        self._flat[slots] = np.ascontiguousarray(rows).reshape(len(rows), self._size).view(self._whole)[:, 0]
