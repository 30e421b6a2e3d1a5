"""The state rows in host memory."""

from collections.abc import Sequence

import numpy as np


class HostArena:
    """The rows, (count, state_size) float32. The operating system allocates a row's memory when it is first written."""

    def __init__(self, count: int, state_size: int) -> None:
        self.rows = np.zeros((count, state_size), np.float32)

    def gather(self, slots: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return copies of the rows, (len(slots), state_size), in `out` if it is given."""
        return self.rows.take(slots, axis=0, out=out, mode="clip")  # "raise" would copy twice

    def scatter(self, slots: Sequence[int] | np.ndarray, rows: np.ndarray) -> None:
        self.rows[slots] = rows

    def read(self, slot: int) -> np.ndarray:
        """Return a copy of one row, (state_size,)."""
        return self.rows[slot].copy()

    def write(self, slot: int, row: np.ndarray) -> None:
        self.rows[slot] = row

    def copy(self, source: int, target: int) -> None:
        self.rows[target] = self.rows[source]
