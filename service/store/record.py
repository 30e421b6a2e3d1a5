"""The record of a session, as kept by stores and state files. Integers are little-endian.

origin   72 bytes that never change: the 8-byte header of `envelope.py` (magic "UNRO", format version 1, tag: the
         durability), SHA-256 of the model, 16 bytes `born`, 16 bytes `opened_with` (zeros if there is none)
then     position u64, lengths of row and last u32
row      the state row, float32; empty for the model's initial state
last     depth u32, count u32, and for each chunk kept for retries: start u64, steps u32, 16 bytes payload digest,
         length of the outputs u32, the concatenated outputs
"""

import struct
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np

from unroll.service.core.errors import SnapshotInvalid
from unroll.service.state.envelope import HEADER_BYTES, Envelope

#: Durabilities of stored sessions, by their tag.
MEMORY, STORED = DURABILITIES = ("memory", "stored")
#: Old names of durabilities, which are still accepted.
_FORMERLY = {"redis": STORED}

ID_BYTES = 16

_ORIGIN = struct.Struct("<32s16s16s")
_ENVELOPE = Envelope(b"UNRO", 1, "a stored session", _ORIGIN.size, tags=len(DURABILITIES))
ORIGIN_BYTES = HEADER_BYTES + _ORIGIN.size
_COUNTS = struct.Struct("<II")
_KEPT = struct.Struct("<QI16sI")
_ONE_KEPT = struct.Struct("<IIQI16sI")
#: After the origin: position, lengths of row and last.
WHOLE = struct.Struct("<QII")


def current_durability(name: Any) -> Any:
    """Replace an old name of a durability in a request or setting; anything else stays as it is."""
    return _FORMERLY.get(name, name) if isinstance(name, str) else name


# Never changed, but not frozen: that would make their creation, which a step may wait for, take four times as long.


@dataclass(slots=True)
class Kept:
    """An applied chunk, kept for retries.

    start: position before it. steps: time steps. digest: payload digest, which identifies a retry. outputs: its reply,
    concatenated; empty if there was no room to keep it.
    """

    start: int
    steps: int
    digest: bytes
    outputs: bytes


@dataclass(slots=True)
class Origin:
    """The part of a session that never changes.

    Attributes:
        model: SHA-256 of the model, hexadecimal.
        durability: One of `DURABILITIES`.
        born: Distinguishes sessions with the same id.
        opened_with: Digest of the steps request that opened the session at position 0; empty if none did.
    """

    model: str
    durability: str
    born: bytes
    opened_with: bytes = b""

    def to_bytes(self) -> bytes:
        header = _ENVELOPE.header(DURABILITIES.index(self.durability))
        return header + _ORIGIN.pack(bytes.fromhex(self.model), self.born, self.opened_with)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises SnapshotInvalid."""
        durability = _ENVELOPE.read_header(content)
        model, born, opened_with = _ORIGIN.unpack_from(content, HEADER_BYTES)
        return cls(model.hex(), DURABILITIES[durability], born, opened_with if any(opened_with) else b"")


@dataclass(slots=True)
class Record:
    """A session.

    Attributes:
        position: Time steps consumed.
        row: The state row, float32; empty for the model's initial state.
        kept: The last chunks, oldest first, at most `depth`.
        token: Token of the commit that wrote the record; no other commit has it.
    """

    origin: Origin
    position: int
    row: bytes
    kept: tuple[Kept, ...] = ()
    depth: int = 1
    token: bytes = b""

    @property
    def last(self) -> bytes:
        return pack_last(self.depth, self.kept)

    def to_bytes(self) -> bytes:
        """Serialise the record without its token, with a checksum."""
        return _ENVELOPE.seal(self.packed())

    def packed(self) -> bytes:
        """Serialise the record without its token and without a checksum."""
        return pack(self.origin.to_bytes(), self.position, self.row, self.last)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """The inverse of `to_bytes`. Raises SnapshotInvalid if the content is damaged."""
        return cls.unpack(_ENVELOPE.unseal(content))

    @classmethod
    def unpack(cls, content: bytes, token: bytes = b"") -> Self:
        """The inverse of `pack`. Raises SnapshotInvalid."""
        begin = ORIGIN_BYTES + WHOLE.size
        if len(content) < begin:
            raise SnapshotInvalid("a stored session is too short")
        position, row, last = WHOLE.unpack_from(content, ORIGIN_BYTES)
        if begin + row + last != len(content):
            raise SnapshotInvalid("the lengths in a stored session contradict its size")
        origin = Origin.from_bytes(content[:ORIGIN_BYTES])
        return cls(origin, position, content[begin : begin + row], *unpack_last(content[begin + row :]), token)


@dataclass(frozen=True, slots=True)
class Gone:
    """A session that has ended.

    Attributes:
        cause: The error code of the reason.
        kept: The chunk that closed the session, if any.
    """

    cause: str
    origin: Origin
    kept: tuple[Kept, ...] = ()


def pack(origin: bytes, position: int, row: bytes, last: bytes) -> bytes:
    """Serialise a record without its token and checksum."""
    return b"".join((origin, WHOLE.pack(position, len(row), len(last)), row, last))


def pack_steps(
    origins: list[bytes], positions: np.ndarray, steps: int, rows: np.ndarray, digests: list[bytes], outputs: np.ndarray
) -> list[bytes]:
    """`pack` for many sessions at once, each of depth 1 with its last chunk.

    Args:
        positions: Positions after the chunk, uint64.
        steps: Time steps of the chunk.
        rows: (sessions, state_size), float32.
        outputs: (sessions, bytes), uint8.
    """
    row, kept = rows[0].nbytes, outputs.shape[1]
    records = np.empty(len(origins), _steps_dtype(row, kept))
    records["origin"] = np.frombuffer(b"".join(origins), records.dtype["origin"])
    records["position"], records["start"], records["steps"] = positions, positions - np.uint64(steps), steps
    records["row_bytes"], records["last_bytes"], records["output_bytes"] = row, _ONE_KEPT.size + kept, kept
    records["depth"] = records["count"] = 1
    records["row"] = np.ascontiguousarray(rows).view(records.dtype["row"])[:, 0]
    records["digest"] = np.frombuffer(b"".join(digests), records.dtype["digest"])
    records["outputs"] = outputs.view(records.dtype["outputs"])[:, 0]
    return split_rows(records)


def split_rows(rows: np.ndarray) -> list[bytes]:
    """The bytes of each row of a contiguous array."""
    content: list[bytes] = rows.reshape(len(rows), -1).view(f"V{rows[0].nbytes}")[:, 0].tolist()
    return content


@cache
def _steps_dtype(row: int, outputs: int) -> np.dtype:
    """The layout of a record of depth 1 with its last chunk, as `pack` and `pack_last_chunk` write it.

    row, outputs: sizes in bytes.
    """
    whole = [("origin", f"V{ORIGIN_BYTES}"), ("position", "<u8"), ("row_bytes", "<u4"), ("last_bytes", "<u4")]
    last = [("depth", "<u4"), ("count", "<u4"), ("start", "<u8"), ("steps", "<u4"), ("digest", "V16")]
    return np.dtype([*whole, ("row", f"V{row}"), *last, ("output_bytes", "<u4"), ("outputs", f"V{outputs}")])


def unpack_trace(content: bytes) -> tuple[bytes, int, bytes]:
    """Origin, position and last chunks from the result of `pack`."""
    position, row, _ = WHOLE.unpack_from(content, ORIGIN_BYTES)
    return content[:ORIGIN_BYTES], position, content[ORIGIN_BYTES + WHOLE.size + row :]


def pack_last(depth: int, kept: tuple[Kept, ...]) -> bytes:
    parts = [_COUNTS.pack(depth, len(kept))]
    for chunk in kept:
        parts += (_KEPT.pack(chunk.start, chunk.steps, chunk.digest, len(chunk.outputs)), chunk.outputs)
    return b"".join(parts)


def pack_last_chunk(start: int, steps: int, digest: bytes, outputs: bytes) -> bytes:
    """`pack_last` for depth 1 and one chunk, the common case, which is written with every step."""
    return _ONE_KEPT.pack(1, 1, start, steps, digest, len(outputs)) + outputs


def unpack_last(content: bytes) -> tuple[tuple[Kept, ...], int]:
    """Return the chunks and the depth. Raises SnapshotInvalid."""
    try:
        depth, count = _COUNTS.unpack_from(content)
        begin, kept = _COUNTS.size, []
        for _ in range(count):
            start, steps, digest, length = _KEPT.unpack_from(content, begin)
            begin += _KEPT.size + length
            kept.append(Kept(start, steps, digest, content[begin - length : begin]))
    except struct.error as error:
        raise SnapshotInvalid("the chunks of a stored session are damaged") from error
    if begin != len(content):
        raise SnapshotInvalid("the chunks of a stored session are damaged")
    return tuple(kept), depth
