"""The stream's binary frames: chunks of many sessions in one message, and their outputs in another.

offset   size  field (little-endian)
0        1     type: 1 steps (from the client), 2 outputs (from the server)
1        1     flags, 0
2        2     reserved, 0
4        4     N >= 1: entries
8        16 N  entries: handle u32, steps T u32, position u64
8 + 16N        values: tensor after tensor in the manifest's order; of each, the entries' (T, *shape) one after another

A frame is read as a whole or not at all: no value is looked at before the lengths agree. What is wrong with the
values of one entry is that entry's error.
"""

import struct
from array import array as packed
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from unroll.bundle import TensorSpec
from unroll.service.core.errors import InvalidRequest, InvalidShape, NonFiniteInput, OutOfRange, UnrollError
from unroll.service.engine.interface import Tensors
from unroll.service.protocol.tensors import all_finite

STEPS, OUTPUTS = 1, 2

#: Entries in one frame.
MAX_ENTRIES = 4096
#: A position that is not said: the chunk begins wherever the session is.
UNSAID = 2**64 - 1

_HEADER = struct.Struct("<BBHI")
_ENTRY = np.dtype([("handle", "<u4"), ("steps", "<u4"), ("position", "<u8")])
_ALONE = struct.Struct("<8sIIQ")  # the header, and the only entry
_ALONE_STEPS = _HEADER.pack(STEPS, 0, 0, 1)
_ALONE_OUTPUTS = _HEADER.pack(OUTPUTS, 0, 0, 1)


class Alone(NamedTuple):
    """The chunk of a frame that has no other. position: where it begins, None if not said. inputs: each (T, *shape)."""

    handle: int
    steps: int
    position: int | None
    inputs: Tensors


class Frame:
    """N chunks. entries: as they came. total: steps of all together.

    even: each input (N, T, *shape), views into the frame, if all entries have T steps; else None.
    chunks: if not even, the inputs of each entry, (T, *shape).
    """

    def __init__(self, entries: np.ndarray, total: int, even: Tensors | None, chunks: list[Tensors]) -> None:
        self.entries = entries
        self.total = total
        self.even = even
        self.chunks = chunks

    @cached_property
    def handles(self) -> list[int]:
        return self.entries["handle"].tolist()

    @cached_property
    def steps(self) -> list[int]:
        return self.entries["steps"].tolist()

    @cached_property
    def positions(self) -> list[int | None]:
        """Where each chunk begins, None if not said."""
        positions: list[int | None] = self.entries["position"].tolist()
        if UNSAID in positions:
            return [None if position == UNSAID else position for position in positions]
        return positions

    @property
    def who(self) -> bytes:
        """The same for frames of the same handles in the same order, with as many steps of each."""
        return self.entries.view("<u8")[::2].tobytes()

    def chunk(self, i: int) -> Tensors:
        """The inputs of entry i: each (T, *shape)."""
        return self.chunks[i] if self.even is None else tuple(array[i] for array in self.even)


class FrameCodec:
    """Reads the frames of steps for models with these inputs. max_steps: in one chunk."""

    def __init__(self, inputs: Sequence[TensorSpec], max_steps: int) -> None:
        self.inputs = tuple(inputs)
        self.max_steps = max_steps
        self._layout = [(spec.numpy, spec.shape, spec.size) for spec in inputs]
        self._step_bytes = sum(spec.nbytes for spec in inputs)
        self._floats = all(spec.dtype == "float32" for spec in inputs)

    def decode_alone(self, frame: bytes) -> Alone | None:
        """The only chunk of a frame, read in one go; None if `decode` is to read it. Raises InvalidRequest."""
        if len(frame) < _ALONE.size:
            return None
        header, handle, steps, position = _ALONE.unpack_from(frame)
        if header != _ALONE_STEPS:
            return None
        if len(frame) != _ALONE.size + steps * self._step_bytes or not steps:
            self._check_length(frame, 1, steps, steps)  # says what is wrong
        return Alone(handle, steps, None if position == UNSAID else position, self._one(frame, steps))

    def _one(self, frame: bytes, steps: int) -> Tensors:
        """The inputs of a frame's only entry, each (steps, *shape)."""
        if len(self._layout) == 1:
            dtype, shape, _ = self._layout[0]
            return (np.ndarray((steps, *shape), dtype, frame, _ALONE.size),)
        offset = _ALONE.size
        inputs = []
        for dtype, shape, size in self._layout:
            values = _values(frame, dtype, steps * size, offset)
            inputs.append(values.reshape(steps, *shape))
            offset += values.nbytes
        return tuple(inputs)

    def decode(self, frame: bytes) -> Frame:
        """Raises InvalidRequest if the frame is not one of steps, or its lengths contradict each other."""
        if len(frame) < _HEADER.size:
            raise InvalidRequest(f"a frame has a header of {_HEADER.size} bytes; this one has {len(frame)} in all")
        kind, flags, reserved, count = _HEADER.unpack_from(frame)
        if (kind, flags, reserved) != (STEPS, 0, 0):
            raise InvalidRequest(f"type {kind}, flags {flags}, reserved {reserved}: a frame of steps has 1, 0, 0")
        if not 1 <= count <= MAX_ENTRIES:
            raise InvalidRequest(f"{count} entries in one frame; there may be 1 to {MAX_ENTRIES}")
        if len(frame) < _HEADER.size + count * _ENTRY.itemsize:
            raise InvalidRequest(f"a frame of {count} entries has more than {len(frame)} bytes")
        entries = np.frombuffer(frame, _ENTRY, count, _HEADER.size)
        steps = entries["steps"]
        fewest, longest = int(steps.min()), int(steps.max())
        total = longest * count if fewest == longest else int(steps.sum(dtype=np.uint64))
        self._check_length(frame, count, total, fewest)
        if fewest < longest:
            return Frame(entries, total, None, self._uneven(frame, total, steps.tolist()))
        offset = _HEADER.size + entries.nbytes
        even = []
        for dtype, shape, size in self._layout:
            values = _values(frame, dtype, total * size, offset)
            offset += values.nbytes
            even.append(values.reshape(count, longest, *shape))
        return Frame(entries, total, tuple(even), [])

    def _uneven(self, frame: bytes, total: int, steps: list[int]) -> list[Tensors]:
        """The inputs of each entry, (T, *shape)."""
        offset = _HEADER.size + len(steps) * _ENTRY.itemsize
        columns = []
        for dtype, shape, size in self._layout:
            values = _values(frame, dtype, total * size, offset)
            offset += values.nbytes
            columns.append(_cut(values.reshape(total, *shape), steps))
        return list(zip(*columns, strict=True))

    def _check_length(self, frame: bytes, count: int, steps: int, fewest: int) -> None:
        """steps: of all entries together."""
        expected = _HEADER.size + count * _ENTRY.itemsize + steps * self._step_bytes
        if len(frame) != expected or not fewest:
            raise InvalidRequest(
                f"{count} entries with {steps} steps together, each at least 1, are {expected} bytes; "
                f"the frame has {len(frame)}"
            )

    def fault(self, chunk: Tensors) -> UnrollError | None:
        """What is wrong with one chunk's values, each input (T, *shape); most often nothing."""
        if self._floats and len(chunk[0]) <= self.max_steps and all(map(all_finite, chunk)):
            return None  # as always
        if len(chunk[0]) > self.max_steps:
            return InvalidShape(f"{len(chunk[0])} time steps in one chunk; at most {self.max_steps} are taken")
        for spec, array in zip(self.inputs, chunk, strict=True):
            if spec.dtype == "float32":
                if not all_finite(array):
                    return _unsound(spec)
            elif _sound(spec, array) is not None:
                return _unsound(spec)
        return None

    def faults(self, frame: Frame) -> dict[int, UnrollError]:
        """The faults of a frame's chunks, by the entry's index."""
        if frame.even is None:
            found = [(i, self.fault(chunk)) for i, chunk in enumerate(frame.chunks)]
            return {i: fault for i, fault in found if fault is not None}
        count, steps = frame.even[0].shape[:2]
        rows = set(range(count)) if steps > self.max_steps else set()
        for spec, array in zip(self.inputs, frame.even, strict=True):
            if (sound := _sound(spec, array)) is not None:
                rows.update(np.flatnonzero(~sound.reshape(len(array), -1).all(axis=1)).tolist())
        return {i: fault for i in sorted(rows) if (fault := self.fault(frame.chunk(i))) is not None}


def entries_of(handles: Sequence[int], steps: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """The head of a frame: whose chunks, how long each, and the position reached."""
    told = np.empty(len(handles), _ENTRY)
    told["handle"], told["steps"], told["position"] = packed("I", handles), packed("I", steps), packed("Q", positions)
    return told


def reached(entries: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The head of the answer to a frame of such entries."""
    told = entries.copy()
    told["position"] = positions
    return told


def encode(entries: np.ndarray, values: Iterable[bytes | memoryview]) -> bytes:
    """Outputs of several chunks. values: contiguous, in the frame's order."""
    return b"".join((_HEADER.pack(OUTPUTS, 0, 0, len(entries)), entries.data, *values))


def encode_one(handle: int, steps: int, position: int, outputs: Tensors) -> bytes:
    """Outputs of one chunk, each (T, *shape), or (*shape) without time."""
    head = _ALONE.pack(_ALONE_OUTPUTS, handle, steps, position)
    if len(outputs) == 1:
        return head + outputs[0].tobytes()
    return b"".join((head, *[output.tobytes() for output in outputs]))


def _values(frame: bytes, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
    """A view into the frame; a copy where the values do not lie as the machine wants them."""
    if offset % dtype.itemsize:
        return np.frombuffer(frame[offset : offset + count * dtype.itemsize], dtype)
    return np.frombuffer(frame, dtype, count, offset)


def _cut(values: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """The array's parts of these lengths, in their order."""
    parts, start = [], 0
    for length in lengths:
        parts.append(values[start : start + length])
        start += length
    return parts


def _sound(spec: TensorSpec, array: np.ndarray) -> np.ndarray | None:
    """Which of the values the tensor may hold; None if it may hold all of them."""
    if spec.dtype == "float32":
        sound = np.isfinite(array)
    elif spec.dtype == "bool":
        sound = array.view(np.uint8) < 2
    elif spec.limit is not None:
        sound = (array >= 0) & (array < spec.limit)
    else:
        return None
    return sound if b"\0" in sound.tobytes() else None  # for one step, half the time of sound.all()


def _unsound(spec: TensorSpec) -> UnrollError:
    if spec.dtype == "float32":
        return NonFiniteInput(f"{spec.name!r} holds NaN or infinity")
    if spec.dtype == "bool":
        return OutOfRange(f"{spec.name!r} must hold bytes 0 or 1")
    return OutOfRange(f"{spec.name!r} must be in 0 … {(spec.limit or 0) - 1}")
