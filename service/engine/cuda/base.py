"""What the engine needs of a GPU, and nothing more: memory, copies, kernels and graphs, all on one stream.

Everything is queued in the order of the calls; what "waits" returns when the stream has come that far. Not for two
threads at once. `driver.py` is the real one; tests have one whose memory is the host's.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from service.engine.memory import Memory


class OutOfDeviceMemory(Exception):
    """There is no room for what was asked for."""


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

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """From one place of the device's memory to another."""
        ...

    def run(self, kernel: str, blocks: int, *arguments: int) -> None:
        """Queue a kernel of `kernels.cu`; its arguments are addresses and 64-bit numbers."""
        ...

    def capture(self, queue: Callable[[], None]) -> Graph:
        """A graph of what `queue()` queues; none of it is run. What it uses must outlive the graph."""
        ...

    def mark(self) -> Mark: ...

    def synchronize(self) -> None:
        """Wait for all that was queued. Raises DeviceFailed if any of it failed."""
        ...
