"""The stream's binary frames: chunks of many sessions in one message, and their outputs in another.

offset   size  field (little-endian)
0        1     type: 1 steps (from the client), 2 outputs, 3 steps of a rollout (from the server)
1        1     flags: 0; for outputs, 1 if the reply to one of the chunks was not kept for a retry
2        2     reserved, 0
4        4     N >= 1: entries
8        16 N  entries: handle u32, steps T u32, position u64
8 + 16N        values: per tensor in the manifest's order, the concatenated (T, *shape) of all entries

A frame is decoded or refused as a whole: no value is read before all lengths agree. An invalid value affects only its
own entry.
"""

import struct
from array import array as packed
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from unroll.bundle import TensorSpec
from unroll.service.core.errors import InvalidRequest, InvalidShape, NonFiniteInput, OutOfRange, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.engine.rows import all_finite
from unroll.service.protocol.tensors import dtype_hint, valid_values

STEPS, OUTPUTS, ROLLED = 1, 2, 3
#: A flag of outputs.
NOT_KEPT = 1

#: Maximum number of entries per frame.
MAX_ENTRIES = 4096
#: The position in an entry that does not specify one: the chunk starts at the session's position.
NO_POSITION = 2**64 - 1

_HEADER = struct.Struct("<BBHI")
_ENTRY = np.dtype([("handle", "<u4"), ("steps", "<u4"), ("position", "<u8")])
_SINGLE_ENTRY = struct.Struct("<8sIIQ")  # the header and the only entry
_SINGLE_STEPS = _HEADER.pack(STEPS, 0, 0, 1)
_SINGLE_OUTPUTS = _HEADER.pack(OUTPUTS, 0, 0, 1)
_SINGLE_ROLLED = _HEADER.pack(ROLLED, 0, 0, 1)
_SINGLE_NOT_KEPT = _HEADER.pack(OUTPUTS, NOT_KEPT, 0, 1)


class SingleEntryFrame(NamedTuple):
    """A frame of one chunk.

    Attributes:
        steps: T, its time steps.
        position: Position of the first step; None if the client did not specify it.
        inputs: Each (T, *shape).
    """

    handle: int
    steps: int
    position: int | None
    inputs: Tensors


class Frame:
    """A frame of N chunks.

    Attributes:
        entries: The table of entries as received, (N,) of handle, steps and position.
        columns: Each input, concatenated over all entries: (total, *shape), views into the frame.
        longest: Time steps of the longest entry.
        total: Time steps of all entries.
        uniform_inputs: Each input as a view (N, T, *shape) if every entry has T steps, else None.
    """

    def __init__(self, entries: np.ndarray, columns: Tensors, longest: int, *, uniform: bool) -> None:
        self.entries = entries
        self.columns = columns
        self.longest = longest
        self.total = len(columns[0])
        count = len(entries)
        self.uniform_inputs: Tensors | None = (
            tuple([column.reshape(count, longest, *column.shape[1:]) for column in columns]) if uniform else None
        )

    @cached_property
    def _chunks(self) -> list[Tensors]:
        return list(zip(*[_split(column, self.steps) for column in self.columns], strict=True))

    @cached_property
    def handles(self) -> list[int]:
        return self.entries["handle"].tolist()

    @cached_property
    def steps(self) -> list[int]:
        return self.entries["steps"].tolist()

    @cached_property
    def positions(self) -> list[int | None]:
        """Position of each chunk's first step; None if the client did not specify it."""
        positions: list[int | None] = self.entries["position"].tolist()
        if NO_POSITION in positions:
            return [None if position == NO_POSITION else position for position in positions]
        return positions

    @property
    def signature(self) -> bytes:
        """Equal for frames with the same handles in the same order, and the same number of steps of each."""
        return self.entries.view("<u8")[::2].tobytes()

    def chunk(self, i: int) -> Tensors:
        """The inputs of entry i: each (T, *shape)."""
        uniform = self.uniform_inputs
        return self._chunks[i] if uniform is None else tuple(array[i] for array in uniform)


class FrameCodec:
    """Decodes the frames of steps for a model.

    Args:
        max_steps: Maximum number of time steps per chunk.

    Attributes:
        step_frame_bytes: Length of a frame of one step.
    """

    def __init__(self, inputs: Sequence[TensorSpec], max_steps: int) -> None:
        self.inputs = tuple(inputs)
        self.max_steps = max_steps
        self._layout = [(spec.numpy, spec.shape, spec.size) for spec in inputs]
        self._step_bytes = sum(spec.nbytes for spec in inputs)
        self.step_frame_bytes = _SINGLE_ENTRY.size + self._step_bytes
        self._all_float = all(spec.dtype == "float32" for spec in inputs)

    def decode_single(self, frame: bytes) -> SingleEntryFrame | None:
        """Decode a frame of one entry, the fast path of `decode`; None for any other frame.

        Raises:
            InvalidRequest: Its length does not match the entry.
        """
        if len(frame) < _SINGLE_ENTRY.size:
            return None
        header, handle, steps, position = _SINGLE_ENTRY.unpack_from(frame)
        if header != _SINGLE_STEPS:
            return None
        if len(frame) != _SINGLE_ENTRY.size + steps * self._step_bytes or not steps:
            self._check_length(frame, 1, steps, steps)
        inputs = self._single_inputs(frame, steps)
        return SingleEntryFrame(handle, steps, None if position == NO_POSITION else position, inputs)

    def split_step(self, frame: bytes) -> tuple[int, int | None, bytes] | None:
        """Split a frame of `step_frame_bytes` into handle, position and values; None if it is not a frame of one step.

        The values are the concatenated inputs, unchecked.
        """
        header, handle, steps, position = _SINGLE_ENTRY.unpack_from(frame)
        if header != _SINGLE_STEPS or steps != 1:
            return None
        return handle, None if position == NO_POSITION else position, frame[_SINGLE_ENTRY.size :]

    def _single_inputs(self, frame: bytes, steps: int) -> Tensors:
        if len(self._layout) == 1:
            dtype, shape, _ = self._layout[0]
            return (np.ndarray((steps, *shape), dtype, frame, _SINGLE_ENTRY.size),)
        offset = _SINGLE_ENTRY.size
        inputs = []
        for dtype, shape, size in self._layout:
            values = _values(frame, dtype, steps * size, offset)
            inputs.append(values.reshape(steps, *shape))
            offset += values.nbytes
        return tuple(inputs)

    def decode(self, frame: bytes) -> Frame:
        """Decode a frame of any number of entries.

        Raises:
            InvalidRequest: It is not a frame of steps, or its lengths are inconsistent.
        """
        if len(frame) < _HEADER.size:
            raise InvalidRequest(f"a frame needs a header of {_HEADER.size} bytes; this one has {len(frame)} in total")
        kind, flags, reserved, count = _HEADER.unpack_from(frame)
        if (kind, flags, reserved) != (STEPS, 0, 0):
            raise InvalidRequest(f"type {kind}, flags {flags}, reserved {reserved}: a frame of steps has 1, 0, 0")
        if not 1 <= count <= MAX_ENTRIES:
            raise InvalidRequest(f"{count} entries in one frame; 1 to {MAX_ENTRIES} are allowed")
        if len(frame) < _HEADER.size + count * _ENTRY.itemsize:
            raise InvalidRequest(f"a frame of {count} entries needs more than {len(frame)} bytes")
        entries = np.frombuffer(frame, _ENTRY, count, _HEADER.size)
        steps = entries["steps"]
        shortest, longest = int(steps.min()), int(steps.max())
        total = longest * count if shortest == longest else int(steps.sum(dtype=np.uint64))
        self._check_length(frame, count, total, shortest)
        offset, columns = _HEADER.size + entries.nbytes, []
        for dtype, shape, size in self._layout:
            values = _values(frame, dtype, total * size, offset)
            offset += values.nbytes
            columns.append(values.reshape(total, *shape))
        return Frame(entries, tuple(columns), longest, uniform=shortest == longest)

    def _check_length(self, frame: bytes, count: int, steps: int, shortest: int) -> None:
        """steps: total over all entries. shortest: minimum over the entries."""
        table, values = _HEADER.size + count * _ENTRY.itemsize, steps * self._step_bytes
        if len(frame) != table + values or not shortest:
            hint = (
                dtype_hint(self.inputs[0], len(frame) - table, self._step_bytes, steps) if len(self.inputs) == 1 else ""
            )
            raise InvalidRequest(
                f"{count} entries of {steps} steps in total, each at least 1, need {table + values} bytes; "
                f"the frame has {len(frame)}{hint}"
            )

    def fault(self, chunk: Tensors) -> UnrollError | None:
        """The error of a chunk, each input (T, *shape); None if it is valid."""
        if self._all_float and len(chunk[0]) <= self.max_steps and all(map(all_finite, chunk)):
            return None
        if len(chunk[0]) > self.max_steps:
            return self._too_long(len(chunk[0]))
        for spec, array in zip(self.inputs, chunk, strict=True):
            if valid_values(spec, array) is not None:
                return _invalid_value(spec)
        return None

    def faults(self, frame: Frame) -> dict[int, UnrollError]:
        """The errors of a frame's chunks, by index of the entry. Chunks with the same error share the object."""
        found: dict[int, UnrollError] = {}
        if frame.longest > self.max_steps:
            found = {i: self._too_long(steps) for i, steps in enumerate(frame.steps) if steps > self.max_steps}
        for spec, column in zip(self.inputs, frame.columns, strict=True):
            if (valid := valid_values(spec, column)) is not None:
                error, ends = _invalid_value(spec), np.cumsum(frame.entries["steps"], dtype=np.int64)
                by_step = valid.reshape(len(column), -1).all(axis=1)
                by_entry = np.logical_and.reduceat(by_step, ends - frame.entries["steps"])
                found = dict.fromkeys(np.flatnonzero(~by_entry).tolist(), error) | found
        return found

    def _too_long(self, steps: int) -> InvalidShape:
        return InvalidShape(f"{steps} time steps in one chunk; at most {self.max_steps} are allowed")


def pack_entries(handles: Sequence[int], steps: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """The table of entries of a frame of outputs. positions: after the chunks."""
    entries = np.empty(len(handles), _ENTRY)
    entries["handle"] = packed("I", handles)
    entries["steps"] = packed("I", steps)
    entries["position"] = packed("Q", positions)
    return entries


def with_positions(entries: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A copy of a table of entries with the positions after the chunks, uint64."""
    answered = entries.copy()
    answered["position"] = positions
    return answered


def encode(entries: np.ndarray, values: Iterable[bytes | memoryview], *, kept: bool = True) -> bytes:
    """Encode the outputs of several chunks. values: contiguous, in the frame's order."""
    return b"".join((_HEADER.pack(OUTPUTS, 0 if kept else NOT_KEPT, 0, len(entries)), entries.data, *values))


def encode_single(handle: int, steps: int, position: int, outputs: Tensors, *, kept: bool = True) -> bytes:
    """Encode the outputs of one chunk, each (T, *shape), or (*shape) without time."""
    head = _SINGLE_ENTRY.pack(_SINGLE_OUTPUTS if kept else _SINGLE_NOT_KEPT, handle, steps, position)
    if len(outputs) == 1:
        return head + outputs[0].tobytes()
    return b"".join((head, *[output.tobytes() for output in outputs]))


def encode_step(handle: int, position: int, values: bytes) -> bytes:
    """Encode the outputs of one step. values: the concatenated outputs."""
    return _SINGLE_ENTRY.pack(_SINGLE_OUTPUTS, handle, 1, position) + values


def encode_rolled(handle: int, steps: int, position: int, tensors: Tensors) -> bytes:
    """Encode steps of a rollout: their inputs, outputs, or both, as requested."""
    head = _SINGLE_ENTRY.pack(_SINGLE_ROLLED, handle, steps, position)
    return b"".join((head, *[tensor.tobytes() for tensor in tensors]))


def _values(frame: bytes, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
    """A view into the frame, or a copy if the values are not aligned."""
    if offset % dtype.itemsize:
        return np.frombuffer(frame[offset : offset + count * dtype.itemsize], dtype)
    return np.frombuffer(frame, dtype, count, offset)


def _split(values: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    parts, start = [], 0
    for length in lengths:
        parts.append(values[start : start + length])
        start += length
    return parts


def _invalid_value(spec: TensorSpec) -> UnrollError:
    if spec.dtype == "float32":
        return NonFiniteInput(f"{spec.name!r} holds {'' if spec.nan else 'NaN or '}infinity")
    if spec.dtype == "bool":
        return OutOfRange(f"{spec.name!r} must hold bytes 0 or 1")
    return OutOfRange(f"{spec.name!r} must be in 0 … {(spec.limit or 0) - 1}")
