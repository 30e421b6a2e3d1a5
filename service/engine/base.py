"""What the scheduler needs of an engine. `host.py` keeps the rows in host memory, `cuda/` in that of a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from unroll.service.core.errors import UnrollError

#: Batches that an engine may have begun and not ended.
LAUNCHED = 2

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
    sources: Sequence[int] | np.ndarray
    targets: Sequence[int] | np.ndarray


#: Outputs, each (rows, longest, *shape) or (rows, *shape) without time, and the rows that failed: the target of one
#: that failed is as it was, and none fails for another's sake.
Result = tuple[Tensors, dict[int, UnrollError]]


class DeviceFailed(Exception):
    """The device fails, and what is on it cannot be trusted any more: the process is to end."""


class Engine(Protocol):
    """Owns the arena. Never called by two threads at once, but that rows which are in no batch may be read, written and
    copied while one is run."""

    def run(self, rows: Rows) -> Result:
        """Raises DeviceFailed."""
        ...

    def launch(self, rows: Rows) -> Callable[[], Result] | None:
        """Begin to run them on the device and return what waits for the result; None: they can only be `run`.

        Results are to be waited for in order, and at most `LAUNCHED` at a time may be outstanding. Raises DeviceFailed.
        """
        ...

    def close(self) -> None:
        """Give back the memory; nothing else may be called afterwards."""
        ...

    def read(self, slot: int) -> np.ndarray:
        """A copy of one state row: (state_size,) float32."""
        ...

    def read_rows(self, slots: Sequence[int]) -> np.ndarray:
        """Copies of several: (len(slots), state_size) float32."""
        ...

    def write(self, slot: int, row: np.ndarray) -> None: ...

    def copy(self, source: int, target: int) -> None: ...
