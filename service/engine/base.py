"""What the scheduler needs of an engine. One implementation a file: `host.py` keeps the rows in host memory."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from service.core.errors import UnrollError

#: One array per model input or output, in the manifest's order: (time, *shape), or (*shape) without time.
Tensors = tuple[np.ndarray, ...]


class BatchRow(Protocol):
    """Run `inputs`, `steps` long, from the state in row `source`; put the new state in row `target`."""

    @property
    def inputs(self) -> Tensors: ...
    @property
    def steps(self) -> int: ...
    @property
    def source(self) -> int: ...
    @property
    def target(self) -> int: ...


class Engine(Protocol):
    """Owns the arena. Never called by two threads at once."""

    def run(self, batch: Sequence[BatchRow]) -> list[Tensors | UnrollError]:
        """One result per row. The target of a row that failed is as it was; no row fails for another's sake."""
        ...

    def read(self, slot: int) -> np.ndarray:
        """A copy of one state row: (state_size,) float32."""
        ...

    def write(self, slot: int, row: np.ndarray) -> None: ...

    def copy(self, source: int, target: int) -> None: ...
