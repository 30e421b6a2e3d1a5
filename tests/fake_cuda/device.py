"""A fake device in host memory: the CUDA engine runs on it with the real model, on onnxruntime's CPU provider.

A captured graph is the function that queued it; kernels are their NumPy equivalents. Operations a GPU forbids within a
graph (allocating, copying, waiting) fail an assertion.
"""

import ctypes
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from unroll.service.engine.cuda.device import Argument, Kernel, OutOfDeviceMemory
from unroll.service.engine.tensor_ref import TensorRef


class FakeDevice:
    """calls: Operations in order. room: Bytes that can be allocated. name: The device for onnxruntime."""

    name = "cpu"
    stream = 0
    multiprocessors = 8

    def __init__(self, room: int = 2**40) -> None:
        self.calls: list[tuple[str, int]] = []
        self._room = room
        self._blocks: dict[int, np.ndarray] = {}
        self._replaying = False

    def close(self) -> None:
        self._room += sum(block.nbytes for block in self._blocks.values())
        self._blocks.clear()

    def allocate(self, shape: Sequence[int], dtype: Any) -> TensorRef:
        assert not self._replaying
        array = np.zeros(shape, dtype)
        if array.nbytes > self._room:
            raise OutOfDeviceMemory(f"{array.nbytes} bytes are wanted, {self._room} are free")
        self._room -= array.nbytes
        self._blocks[array.ctypes.data] = array
        return TensorRef.of(array)

    def free(self, memory: TensorRef) -> None:
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

    def download_rows(self, rows: np.ndarray, sources: Sequence[int]) -> None:
        for row, source in zip(rows, sources, strict=True):
            self.download(row, source)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._transfer("copy", target, source, nbytes)

    def prepare(self, kernel: Kernel) -> None:
        assert not self._replaying

    def run(self, kernel: Kernel, blocks: tuple[int, int], *arguments: Argument) -> None:
        self.calls.append((kernel.name, blocks[0]))
        if kernel.file == "cells.cu":
            step(dict(kernel.constants), *arguments)
        else:
            {"gather": gather, "commit": commit}[kernel.name](blocks[0], *map(int, arguments))

    def capture(self, queue: Callable[[], None]) -> "FakeGraph":
        return FakeGraph(self, queue)

    def event(self) -> "FakeEvent":
        return FakeEvent(self)

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


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def record(self) -> None: ...

    def wait(self) -> None:
        self._device.calls.append(("wait", 0))


def at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    nbytes = prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_byte * nbytes).from_address(address), dtype).reshape(shape)


def gather(
    rows: int,
    arena: int,
    width: int,
    sources: int,
    state: int,
    failed: int,
    first: int,
    call: int,
    host: int,
    call_bytes: int,
) -> None:
    assert call_bytes % 16 == 0
    if call_bytes:
        ctypes.memmove(call, host, call_bytes)
    if at(first, (1,), np.int64)[0]:
        at(failed, (rows,), np.int32)[:] = 0
    if state:
        for row, slot in enumerate(at(sources, (rows,), np.int64)):
            ctypes.memmove(state + 4 * width * row, arena + 4 * width * int(slot), 4 * width)


def commit(
    rows: int,
    arena: int,
    width: int,
    targets: int,
    state: int,
    failed: int,
    host_failed: int,
    outputs: int,
    checked: int,
    tensors: int,
    host: int,
    output_bytes: int,
) -> None:
    fine = np.isfinite(at(state, (rows, width), np.float32)).all(axis=1)
    for first, floats in at(checked, (tensors, 2), np.int64) if tensors else ():
        fine &= np.isfinite(at(outputs + int(first), (rows, int(floats)), np.float32)).all(axis=1)
    bad = at(failed, (rows,), np.int32)
    for row, slot in enumerate(at(targets, (rows,), np.int64).tolist()):
        bad[row] |= slot >= 0 and not fine[row]
        if slot >= 0 and not bad[row]:
            ctypes.memmove(arena + 4 * width * slot, state + 4 * width * row, 4 * width)
    at(host_failed, (rows,), np.int32)[:] = bad
    assert output_bytes % 16 == 0
    if output_bytes:
        ctypes.memmove(host, outputs, output_bytes)


def step(constants: dict[str, int], *arguments: Any) -> None:
    x, arena, slots, state_out, y, weights, bias, unscale, _, rows, inputs, hidden, width, h_at, c_at = arguments
    rows, inputs, hidden, width, h_at, c_at = map(int, (rows, inputs, hidden, width, h_at, c_at))
    lstm = bool(constants["LSTM"])
    both = unpack(weights, lstm, constants["PARTS"], inputs, hidden) * float(unscale)
    b = at(bias, (4, hidden), np.float32)
    found = [at(arena + 4 * width * int(slot), (width,), np.float32) for slot in at(slots, (rows,), np.int64)]
    after = _cell(lstm, at(x, (rows, inputs), np.float32), np.stack(found), both, b, h_at, c_at)
    out = at(state_out, (rows, width), np.float32)
    parts = [slice(h_at, h_at + hidden), *([slice(c_at, c_at + hidden)] if lstm else [])]
    for part in parts:
        out[:, part] = after[:, part]
    at(y, (rows, hidden), np.float32)[:] = after[:, parts[0]]


def cell_step(
    lstm: bool,
    x: np.ndarray,
    states: np.ndarray,
    w: np.ndarray,
    r: np.ndarray,
    b: np.ndarray,
    hidden: int,
    h_at: int,
    c_at: int,
) -> np.ndarray:
    """Return the new states in float64, from weights in ONNX's layout."""
    gates = 4 if lstm else 3
    both = np.concatenate([side.reshape(gates, hidden, -1) for side in (w, r)], axis=2).astype(float)
    wb, rb = b.reshape(2, gates, hidden).astype(float)
    bias = wb + rb if lstm else np.stack([wb[0] + rb[0], wb[1] + rb[1], wb[2], rb[2]])
    return _cell(lstm, x, states, both, bias, h_at, c_at)


def _cell(
    lstm: bool, x: np.ndarray, states: np.ndarray, both: np.ndarray, b: np.ndarray, h_at: int, c_at: int
) -> np.ndarray:
    """Compute what `cells.cu` does, in float64."""
    inputs, hidden, after = x.shape[1], both.shape[1], states.astype(float)
    h, b = states[:, h_at : h_at + hidden].astype(float), b.astype(float)
    over_x = np.einsum("bi,ghi->gbh", x.astype(float), both[:, :, :inputs])
    over_h = np.einsum("bi,ghi->gbh", h, both[:, :, inputs:])
    if lstm:
        i, o, f, g = over_x + over_h + b[:, None]
        c = sigmoid(f) * after[:, c_at : c_at + hidden] + sigmoid(i) * np.tanh(g)
        after[:, c_at : c_at + hidden] = c
        after[:, h_at : h_at + hidden] = sigmoid(o) * np.tanh(c)
    else:
        z, r = (over_x + over_h)[:2] + b[:2, None]
        candidate = np.tanh(over_x[2] + b[2] + sigmoid(r) * (over_h[2] + b[3]))
        after[:, h_at : h_at + hidden] = (1 - sigmoid(z)) * candidate + sigmoid(z) * h
    return after


def sigmoid(value: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-value))


def unpack(weights: int, lstm: bool, parts: int, inputs: int, hidden: int) -> np.ndarray:
    """Invert `cells.pack`, except for the power of two; return (gates, hidden, inputs + hidden)."""
    padded, wide = -(-hidden // 128) * 128, [-(-length // 32) * 32 for length in (inputs, hidden)]
    chunks, gates = sum(wide) // 32, 4 if lstm else 3
    group, tiles = (8, 2) if lstm else (16, 3)
    shape = (padded // group, chunks, tiles, 2, parts, 8, 4, 2, 2, 2)
    fragments = at(weights, shape, np.float16).astype(float).sum(axis=4)
    # group chunk tile step g t upper half pair -> tile group half g chunk t step upper pair
    rows = fragments.transpose(2, 0, 7, 4, 1, 5, 3, 6, 8)
    if lstm:  # tile group half g -> tile half group g
        rows = rows.swapaxes(1, 2)
    both = rows.reshape(gates, padded, sum(wide))[:, :hidden]
    return np.concatenate([both[:, :, :inputs], both[:, :, wide[0] : wide[0] + hidden]], axis=2)
