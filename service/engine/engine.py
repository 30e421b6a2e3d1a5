"""The interface between the scheduler and an engine.

`host_engine.py` implements it with the state rows in host memory, `cuda/` with the rows in a GPU's memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from unroll.service.core.errors import UnrollError

#: Maximum number of launched batches without a fetched result.
MAX_LAUNCHED = 2

#: One array per model input or output, in the manifest's order: (time, *shape), or (*shape) without time.
Tensors = tuple[np.ndarray, ...]


class Rows(Protocol):
    """A batch: row i runs `lens[i]` steps from the state in slot `sources[i]`; its new state goes to `targets[i]`."""

    @property
    def inputs(self) -> Tensors:
        """Each (rows, longest, *shape)."""

    @property
    def lens(self) -> Sequence[int]: ...
    @property
    def sources(self) -> Sequence[int] | np.ndarray: ...
    @property
    def targets(self) -> Sequence[int] | np.ndarray: ...


@dataclass(frozen=True, slots=True, eq=False)
class PlainRows:
    """A batch from outside the scheduler."""

    inputs: Tensors
    lens: Sequence[int]
    sources: Sequence[int] | np.ndarray
    targets: Sequence[int] | np.ndarray


#: The outputs, each (rows, longest, *shape) or (rows, *shape) without time, and the errors by row. The target of a
#: failed row keeps its state. A row never fails because of another row.
BatchResult = tuple[Tensors, dict[int, UnrollError]]


class DeviceFailed(Exception):
    """The device failed and nothing on it can be trusted: the process must end."""


class Engine(Protocol):
    """Owns the arena of state rows and runs batches on it.

    Only one thread calls it at a time, with one exception: rows that are in no batch may be read, written and copied
    while a batch runs.
    """

    def run(self, rows: Rows) -> BatchResult:
        """Run a batch and return its result.

        Raises:
            DeviceFailed: The device failed.
        """

    def launch(self, rows: Rows) -> Callable[[], BatchResult] | None:
        """Start a batch on the device and return a function that waits for its result.

        Wait for results in order, and keep at most `MAX_LAUNCHED` outstanding.

        Returns:
            The function, or None if the engine can only `run` this batch.

        Raises:
            DeviceFailed: The device failed.
        """

    def close(self) -> None:
        """Free the memory. The engine must not be used after this."""

    def read(self, slot: int) -> np.ndarray:
        """Return a copy of one state row: (state_size,) float32."""

    def read_rows(self, slots: Sequence[int]) -> np.ndarray:
        """Return copies of several state rows: (len(slots), state_size) float32."""

    def write(self, slot: int, row: np.ndarray) -> None:
        """Set one state row: (state_size,) float32."""

    def copy(self, source: int, target: int) -> None:
        """Copy one state row to another slot."""
