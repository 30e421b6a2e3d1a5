"""What the scheduler needs of an engine. One implementation a file: `host.py` keeps the rows in host memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from service.core.errors import UnrollError

#: One array per model input or output, in the manifest's order: (time, *shape), or (*shape) without time.
Tensors = tuple[np.ndarray, ...]


class Rows(Protocol):
    """Run row i of `inputs`, lens[i] steps long, from the state in sources[i]; put the new one in targets[i]."""

    @property
    def inputs(self) -> Tensors:
        """Each (rows, longest, *shape)."""
        ...

    @property
    def lens(self) -> Sequence[int]: ...
    @property
    def sources(self) -> Sequence[int] | np.ndarray: ...
    @property
    def targets(self) -> Sequence[int] | np.ndarray: ...


@dataclass(frozen=True, slots=True, eq=False)
class PlainRows:
    """Rows that belong to no batch of the scheduler's."""

    inputs: Tensors
    lens: Sequence[int]
    sources: Sequence[int]
    targets: Sequence[int]


class Engine(Protocol):
    """Owns the arena. Never called by two threads at once."""

    def run(self, rows: Rows) -> tuple[Tensors, dict[int, UnrollError]]:
        """Outputs, each (rows, longest, *shape) or (rows, *shape) without time, and the rows that failed.

        The target of a row that failed is as it was; no row fails for another's sake.
        """
        ...

    def read(self, slot: int) -> np.ndarray:
        """A copy of one state row: (state_size,) float32."""
        ...

    def write(self, slot: int, row: np.ndarray) -> None: ...

    def copy(self, source: int, target: int) -> None: ...
