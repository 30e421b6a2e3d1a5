"""A device whose memory is the host's: the CUDA engine runs on it with the real model, on onnxruntime's CPU provider.

A captured graph is the function that queued it; kernels are their NumPy equivalents. What a GPU would not forgive is an
assertion here: taking memory, copying or waiting within a graph.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from service.engine.cuda.base import OutOfDeviceMemory
from service.engine.memory import Memory


class FakeDevice:
    """calls: what was done, in order. room: bytes that can be allocated."""

    name = "cuda:0"
    stream = 0

    def __init__(self, room: int = 2**40) -> None:
        self.calls: list[tuple[str, int]] = []
        self._room = room
        self._blocks: dict[int, np.ndarray] = {}
        self._replaying = False

    def close(self) -> None:
        self._room += sum(block.nbytes for block in self._blocks.values())
        self._blocks.clear()

    def allocate(self, shape: Sequence[int], dtype: Any) -> Memory:
        assert not self._replaying
        array = np.zeros(shape, dtype)
        if array.nbytes > self._room:
            raise OutOfDeviceMemory(f"{array.nbytes} bytes are wanted, {self._room} are free")
        self._room -= array.nbytes
        self._blocks[array.ctypes.data] = array
        return Memory.of(array)

    def free(self, memory: Memory) -> None:
        self._room += self._blocks.pop(memory.pointer).nbytes

    def host_block(self, nbytes: int) -> np.ndarray:
        assert not self._replaying
        block = np.zeros(nbytes, np.uint8)
        self._blocks[block.ctypes.data] = block
        return block

    def free_bytes(self) -> int:
        return self._room

    def upload(self, target: int, array: np.ndarray) -> None:
        self._transfer("upload", target, array.ctypes.data, array.nbytes)

    def download(self, array: np.ndarray, source: int) -> None:
        self._transfer("download", array.ctypes.data, source, array.nbytes)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._transfer("copy", target, source, nbytes)

    def run(self, kernel: str, blocks: int, *arguments: int) -> None:
        self.calls.append((kernel, blocks))
        {"gather": gather, "commit": commit}[kernel](blocks, *arguments)

    def capture(self, queue: Callable[[], None]) -> "FakeGraph":
        return FakeGraph(self, queue)

    def mark(self) -> "FakeMark":
        return FakeMark(self)

    def synchronize(self) -> None:
        assert not self._replaying

    def _transfer(self, kind: str, target: int, source: int, nbytes: int) -> None:
        assert not self._replaying
        self.calls.append((kind, nbytes))
        ctypes.memmove(target, source, nbytes)


class FakeGraph:
    def __init__(self, device: FakeDevice, queue: Callable[[], None]) -> None:
        self._device, self._queue = device, queue

    def launch(self) -> None:
        self._device.calls.append(("launch", 0))
        self._device._replaying = True
        self._queue()
        self._device._replaying = False


class FakeMark:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def set(self) -> None: ...

    def wait(self) -> None:
        self._device.calls.append(("wait", 0))


def at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_byte * nbytes).from_address(address), dtype).reshape(shape)


def gather(
    rows: int, arena: int, width: int, sources: int, state: int, inputs: int, call_inputs: int, input_bytes: int
) -> None:
    if input_bytes:
        assert input_bytes % 16 == 0
        ctypes.memmove(inputs, call_inputs, input_bytes)
    for row, slot in enumerate(at(sources, (rows,), np.int64)):
        ctypes.memmove(state + 4 * width * row, arena + 4 * width * int(slot), 4 * width)


def commit(
    rows: int,
    arena: int,
    width: int,
    targets: int,
    state: int,
    failed: int,
    outputs: int,
    checked: int,
    tensors: int,
    call_outputs: int,
    output_bytes: int,
) -> None:
    bad = ~np.isfinite(at(state, (rows, width), np.float32)).all(axis=1)
    for first, floats in at(checked, (tensors, 2), np.int64) if tensors else ():
        values = at(outputs + int(first), (rows, int(floats)), np.float32)
        bad |= ~np.isfinite(values).all(axis=1)
    at(failed, (rows,), np.int32)[:] = bad
    for row, slot in enumerate(at(targets, (rows,), np.int64)):
        if not bad[row]:
            ctypes.memmove(arena + 4 * width * int(slot), state + 4 * width * row, 4 * width)
    if output_bytes:
        assert output_bytes % 16 == 0
        ctypes.memmove(call_outputs, outputs, output_bytes)
