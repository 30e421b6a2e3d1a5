"""The stream's binary frames, as docs/protocol.md specifies them: steps to the server, outputs from it.

A frame has a header of 8 bytes (type, flags, N), N entries of 16 bytes (handle, steps T, position), and the values:
tensor by tensor, each as the concatenation of the entries' (T, *shape).
"""

import struct
from collections.abc import Iterator, Sequence

import numpy as np

from unroll.client.tensors import Tensor

_HEADER = struct.Struct("<BBHI")
_STEPS, _OUTPUTS = 1, 2
#: The first byte of a frame of a rollout.
ROLLED = b"\x03"
_ENTRY = np.dtype([("handle", "<u4"), ("steps", "<u4"), ("position", "<u8")])

#: Limits on the entries and bytes of a frame that is sent; servers accept at least this much by default.
MOST_ENTRIES, MOST_BYTES = 2048, 4 * 2**20


def pack_steps(handles: np.ndarray, steps: int, positions: np.ndarray, inputs: Sequence[np.ndarray]) -> Iterator[bytes]:
    """Yield frames with one chunk per session.

    Args:
        handles: The sessions' handles, (N,).
        steps: T, the length of every chunk.
        positions: The positions of the first steps, (N,).
        inputs: Arrays (N, T, *shape).
    """
    row_bytes = sum(array[0].nbytes for array in inputs)
    each = max(1, min(MOST_ENTRIES, MOST_BYTES // row_bytes))
    for begin in range(0, len(handles), each):
        rows = slice(begin, begin + each)
        entries = np.empty(len(handles[rows]), _ENTRY)
        entries["handle"], entries["steps"], entries["position"] = handles[rows], steps, positions[rows]
        header = _HEADER.pack(_STEPS, 0, 0, len(entries))
        yield b"".join([header, entries.tobytes(), *[array[rows].tobytes() for array in inputs]])


def unpack_outputs(frame: bytes, tensors: Sequence[Tensor]) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Decode a frame of outputs, or of rollout steps.

    Args:
        frame: The frame.
        tensors: The tensors in the frame: the outputs; for a rollout, the inputs and then the outputs.

    Returns:
        The entries (N,) with handle, steps and position; and for each tensor, an array per entry.

    Raises:
        ValueError: The frame is of another type, or damaged.
    """
    kind, _, _, count = _HEADER.unpack_from(frame)
    if kind != _OUTPUTS and frame[:1] != ROLLED:
        raise ValueError(f"a frame of type {kind}")
    entries = np.frombuffer(frame, _ENTRY, count, _HEADER.size)
    steps = entries["steps"].tolist()
    begin = _HEADER.size + entries.nbytes
    columns = []
    for spec in tensors:
        lengths = steps if spec.time else [1] * count
        values = np.frombuffer(frame, spec.numpy, sum(lengths) * spec.size, begin).reshape(-1, *spec.shape)
        begin += values.nbytes
        if min(lengths) == max(lengths):
            column = list(values.reshape(count, lengths[0], *spec.shape))
        else:
            column = np.split(values, np.cumsum(lengths[:-1]))
        columns.append(column if spec.time else [array[0] for array in column])
    return entries, columns
