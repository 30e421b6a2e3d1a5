"""The binary frames of docs/protocol.md, from the server's side: decodes steps, encodes outputs."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unroll.client.conformance.refusals import Refusal
from unroll.client.conformance.toy_models import ToyModel, bytes_of
from unroll.client.conformance.toy_rollouts import Rolled

_HEADER = struct.Struct("<BBHI")
_ENTRY = struct.Struct("<IIQ")
_STEPS, _OUTPUTS, _ROLLED = 1, 2, 3
_UNSPECIFIED = 2**64 - 1


@dataclass(frozen=True)
class Chunk:
    """An entry in a frame of steps; `position` is None if the client did not specify it."""

    handle: int
    steps: int
    position: int | None
    inputs: list[np.ndarray]


def read_steps(model: ToyModel, frame: bytes) -> list[Chunk]:
    """Decode a frame of steps. Raises Refusal if it is inconsistent."""
    try:
        kind, flags, reserved, count = _HEADER.unpack_from(frame)
        entries = [_ENTRY.unpack_from(frame, _HEADER.size + _ENTRY.size * index) for index in range(count)]
    except struct.error as error:
        raise Refusal("malformed_request", f"the frame is too short: {error}") from error
    if (kind, flags, reserved) != (_STEPS, 0, 0) or not count or not all(steps for _, steps, _ in entries):
        raise Refusal("malformed_request", f"a frame of type {kind}, flags {flags}, {count} entries")
    total = sum(steps for _, steps, _ in entries)
    begin = _HEADER.size + _ENTRY.size * count
    if len(frame) - begin != sum(bytes_of(spec, total) for spec in model.inputs):
        raise Refusal("malformed_request", f"{count} entries of {total} steps do not fit a frame of {len(frame)} bytes")
    inputs: list[list[np.ndarray]] = [[] for _ in entries]
    for spec in model.inputs:
        for kept, (_, steps, _) in zip(inputs, entries, strict=True):
            end = begin + bytes_of(spec, steps)
            kept.append(np.frombuffer(frame[begin:end], spec.numpy).reshape(steps, *spec.shape))
            begin = end
    return [
        Chunk(handle, steps, None if position == _UNSPECIFIED else position, arrays)
        for (handle, steps, position), arrays in zip(entries, inputs, strict=True)
    ]


#: The handle, T, the position after the chunk, and the outputs.
Outputs = tuple[int, int, int, Sequence[np.ndarray]]


def write_outputs(entries: Sequence[Outputs], flags: int = 0) -> bytes:
    parts = [_HEADER.pack(_OUTPUTS, flags, 0, len(entries))]
    parts += [_ENTRY.pack(handle, steps, end) for handle, steps, end, _ in entries]
    for tensor in zip(*[outputs for *_, outputs in entries], strict=True):
        parts += [array.tobytes() for array in tensor]
    return b"".join(parts)


def write_rolled(handle: int, rolled: Rolled) -> bytes:
    head = _HEADER.pack(_ROLLED, 0, 0, 1) + _ENTRY.pack(handle, len(rolled.inputs[0]), rolled.end)
    return head + b"".join(array.tobytes() for array in (*rolled.inputs, *rolled.outputs))
