"""The last single step of each session: what it was given and what was answered, so that a retry gets it again."""

from collections.abc import Sequence

import numpy as np

from bundle import TensorSpec

Tensors = tuple[np.ndarray, ...]

#: Larger steps are kept by their sessions one by one: a table for all of them would be mostly empty.
MAX_STEP_BYTES = 4096


class LastSteps:
    """Matrices with a row per session, as the arena is for states: a batch is kept in one copy per tensor.

    The memory is the operating system's until a row is first written.
    """

    def __init__(self, rows: int, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self._inputs = [np.zeros((rows, 1, *spec.shape), spec.numpy) for spec in inputs]
        self._outputs = [np.zeros((rows, *(1,) * spec.time, *spec.shape), spec.numpy) for spec in outputs]

    @staticmethod
    def fits(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
        return sum(spec.nbytes for spec in (*inputs, *outputs)) <= MAX_STEP_BYTES

    def keep(self, slots: Sequence[int] | np.ndarray, inputs: Tensors, outputs: Tensors) -> None:
        """inputs: each (len(slots), 1, *shape); outputs: the same, or (len(slots), *shape) without time."""
        for table, rows in zip(self._inputs, inputs, strict=True):
            table[slots] = rows
        for table, rows in zip(self._outputs, outputs, strict=True):
            table[slots] = rows

    def payload(self, slot: int) -> Tensors:
        """What the session in this row was given: each (1, *shape)."""
        return tuple(table[slot] for table in self._inputs)

    def answer(self, slot: int) -> Tensors:
        """What it was answered: each (1, *shape), or (*shape) without time."""
        return tuple(table[slot].copy() for table in self._outputs)
