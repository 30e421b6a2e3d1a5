"""The interface between the engine and a GPU: memory, copies, kernels and graphs, all on one stream.

Every call is queued in order. A method that waits returns when the stream has reached it. Only one thread calls a
device at a time. `driver.py` is the implementation; tests use one in host memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from unroll.service.engine.tensor_ref import TensorRef

Argument = int | np.int32 | np.float32


class CompilationFailed(Exception):
    """A kernel cannot be compiled for this device."""


class OutOfDeviceMemory(Exception):
    """The device has too little free memory for an allocation."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel in one of this package's CUDA files, and how it is launched.

    Attributes:
        constants: The file's compile-time constants, by name.
        cluster: Blocks that can access one another's shared memory.
        overlaps_previous: The kernel may start while the previous kernel runs; it waits for that kernel itself.
    """

    file: str
    name: str
    constants: tuple[tuple[str, int], ...] = ()
    threads: int = 256
    cluster: int = 1
    shared_bytes: int = 0
    overlaps_previous: bool = False


class Graph(Protocol):
    """Captured work that one call queues again."""

    def launch(self) -> None: ...


class Event(Protocol):
    """A point in the stream."""

    def record(self) -> None:
        """Move the event to the end of the stream."""

    def wait(self) -> None:
        """Wait until the stream has reached the event."""


class Device(Protocol):
    """A GPU and one stream.

    Attributes:
        name: `cuda:N`.
        stream: The stream's address, for onnxruntime.
    """

    name: str
    stream: int
    multiprocessors: int

    def close(self) -> None:
        """Free all memory and all graphs, which must not be used after this."""

    def allocate(self, shape: Sequence[int], dtype: Any) -> TensorRef:
        """Allocate a tensor of zeros.

        Raises:
            OutOfDeviceMemory: There is too little free memory.
        """

    def free(self, memory: TensorRef) -> None:
        """Free an allocated tensor."""

    def host_block(self, nbytes: int) -> np.ndarray:
        """Allocate zeroed host memory that kernels access at `array.ctypes.data`. It is freed by `close`."""

    def free_bytes(self) -> int:
        """Return the bytes that are free on the device."""

    def upload(self, target: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device, and wait."""

    def download(self, array: np.ndarray, source: int) -> None:
        """Fill a contiguous array from the device, and wait."""

    def download_rows(self, rows: np.ndarray, sources: Sequence[int]) -> None:
        """Fill each row of a contiguous array from its own device address, and wait once."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy between two device addresses."""

    def prepare(self, kernel: Kernel) -> None:
        """Compile and load a kernel, which must not happen during a capture.

        Raises:
            CompilationFailed: The kernel cannot be compiled.
        """

    def run(self, kernel: Kernel, blocks: tuple[int, int], *arguments: Argument) -> None:
        """Queue a kernel. An `int` argument is an address or a 64-bit number."""

    def capture(self, queue: Callable[[], None]) -> Graph:
        """Record the work that `queue` queues, without running it. The memory it uses must outlive the graph."""

    def event(self) -> Event:
        """Create an event."""

    def synchronize(self) -> None:
        """Wait for all queued work.

        Raises:
            DeviceFailed: Some work failed.
        """
