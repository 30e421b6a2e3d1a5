"""What the engine needs of a GPU, and nothing more: memory, copies, kernels and graphs, all on one stream.

Everything is queued in the order of the calls; what "waits" returns when the stream has come that far. Not for two
threads at once. `driver.py` is the real one; tests have one whose memory is the host's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from unroll.service.engine.memory import Memory

Argument = int | np.int32 | np.float32


class CompilationFailed(Exception):
    """A kernel cannot be made for this device."""


class OutOfDeviceMemory(Exception):
    """There is no room for what was asked for."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of one of this package's CUDA files, and how it is launched.

    constants: the file's, by name. threads: of a block. cluster: blocks that reach one another's shared memory, of
    `shared_bytes` each. early: may begin while the kernel before it still runs, and waits for it by itself.
    """

    file: str
    name: str
    constants: tuple[tuple[str, int], ...] = ()
    threads: int = 256
    cluster: int = 1
    shared_bytes: int = 0
    early: bool = False


class Graph(Protocol):
    """What was queued while it was captured, to be queued again by one call."""

    def launch(self) -> None: ...


class Mark(Protocol):
    """A place in the stream."""

    def set(self) -> None:
        """Here."""
        ...

    def wait(self) -> None: ...


class Device(Protocol):
    """name: `cuda:N`. stream: its address, for onnxruntime."""

    name: str
    stream: int
    multiprocessors: int

    def close(self) -> None:
        """Give back all memory and all graphs: none may be used any more."""
        ...

    def allocate(self, shape: Sequence[int], dtype: Any) -> Memory:
        """Zeros. Raises OutOfDeviceMemory."""
        ...

    def free(self, memory: Memory) -> None: ...

    def host_block(self, nbytes: int) -> np.ndarray:
        """Zero bytes of host memory, for good, that kernels read and write at `array.ctypes.data`."""
        ...

    def free_bytes(self) -> int: ...

    def upload(self, target: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device; waits."""
        ...

    def download(self, array: np.ndarray, source: int) -> None:
        """Fill a contiguous array from the device; waits."""
        ...

    def download_rows(self, rows: np.ndarray, sources: Sequence[int]) -> None:
        """Fill each row of a contiguous array from a place of the device's memory; waits once."""
        ...

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """From one place of the device's memory to another."""
        ...

    def prepare(self, kernel: Kernel) -> None:
        """What must not wait until a capture. Raises CompilationFailed."""
        ...

    def run(self, kernel: Kernel, blocks: tuple[int, int], *arguments: Argument) -> None:
        """Queue a kernel; of its arguments, an `int` is an address or a number of 64 bits."""
        ...

    def capture(self, queue: Callable[[], None]) -> Graph:
        """A graph of what `queue()` queues; none of it is run. What it uses must outlive the graph."""
        ...

    def mark(self) -> Mark: ...

    def synchronize(self) -> None:
        """Wait for all that was queued. Raises DeviceFailed if any of it failed."""
        ...
