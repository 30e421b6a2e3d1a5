"""A session as bytes: what a store keeps of it, and what a state file holds. Integers are little-endian.

origin   72 bytes, the same for a session's whole life: magic "UNRO", format version u16, durability u8,
         reserved u8, SHA-256 of the model, 16 bytes `born`, 16 bytes `opened_with` (zeros: none)
then     position u64, lengths of row and last u32
row      the state row, float32; empty: the model's initial state
last     depth u32, count u32, and for each chunk that can be asked for again: start u64, steps u32,
         16 bytes digest of its payload, length of the outputs u32, the outputs' values one after another
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import Self

from unroll.service.core.errors import SnapshotInvalid

#: What a session may be opened with, by the number that `origin` has for it.
DURABILITIES = ("memory", "redis")

ID_BYTES = 16

_ORIGIN = struct.Struct("<4sHBB32s16s16s")
ORIGIN_BYTES = _ORIGIN.size
_MAGIC, _VERSION = b"UNRO", 1
_COUNTS = struct.Struct("<II")
_KEPT = struct.Struct("<QI16sI")
_WHOLE = struct.Struct("<QII")
_CHECKSUM = 16


@dataclass(frozen=True, slots=True)
class Kept:
    """A chunk that was applied: where it began, its steps, the digest of its payload, the bytes of its outputs."""

    start: int
    steps: int
    digest: bytes
    outputs: bytes


@dataclass(frozen=True, slots=True)
class Origin:
    """What never changes in a session's life. model: SHA-256, hexadecimal. born: tells it from others of the same id.

    opened_with: digest of the request that opened it by steps at position 0, if one did.
    """

    model: str
    durability: str
    born: bytes
    opened_with: bytes = b""

    def to_bytes(self) -> bytes:
        return _ORIGIN.pack(
            *(_MAGIC, _VERSION, DURABILITIES.index(self.durability), 0),
            *(bytes.fromhex(self.model), self.born, self.opened_with),
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises SnapshotInvalid."""
        if len(content) != _ORIGIN.size or content[:4] != _MAGIC:
            raise SnapshotInvalid("what is stored of this session is not a session")
        _, version, durability, reserved, model, born, opened_with = _ORIGIN.unpack(content)
        if version != _VERSION or reserved or durability >= len(DURABILITIES):
            raise SnapshotInvalid(f"the session is stored in format {version}; this server reads {_VERSION}")
        return cls(model.hex(), DURABILITIES[durability], born, opened_with if any(opened_with) else b"")


@dataclass(frozen=True, slots=True)
class Record:
    """A session. position: time steps consumed. row: its state, or empty. kept: latest last, at most `depth`.

    token: of the commit that wrote it; unique to that commit.
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
        """All of it but the token, with a checksum."""
        content = pack(self.origin.to_bytes(), self.position, self.row, self.last)
        return content + _checksum(content)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises SnapshotInvalid if damaged."""
        body = content[:-_CHECKSUM]
        if _checksum(body) != content[-_CHECKSUM:]:
            raise SnapshotInvalid("a stored session is damaged: its checksum differs")
        return cls.unpack(body)

    @classmethod
    def unpack(cls, content: bytes, token: bytes = b"") -> Self:
        """What `pack` made. Raises SnapshotInvalid."""
        begin = _ORIGIN.size + _WHOLE.size
        if len(content) < begin:
            raise SnapshotInvalid("a stored session is too short")
        position, row, last = _WHOLE.unpack_from(content, _ORIGIN.size)
        if begin + row + last != len(content):
            raise SnapshotInvalid("a stored session contradicts itself")
        origin = Origin.from_bytes(content[: _ORIGIN.size])
        return cls(origin, position, content[begin : begin + row], *unpack_last(content[begin + row :]), token)


@dataclass(frozen=True, slots=True)
class Gone:
    """What is known of a session whose state is gone: the code of the cause, and the chunk that ended it, if any."""

    cause: str
    origin: Origin
    kept: tuple[Kept, ...] = ()


def pack(origin: bytes, position: int, row: bytes, last: bytes) -> bytes:
    """A record, but for its token."""
    return b"".join((origin, _WHOLE.pack(position, len(row), len(last)), row, last))


def pack_last(depth: int, kept: tuple[Kept, ...]) -> bytes:
    parts = [_COUNTS.pack(depth, len(kept))]
    for chunk in kept:
        parts += (_KEPT.pack(chunk.start, chunk.steps, chunk.digest, len(chunk.outputs)), chunk.outputs)
    return b"".join(parts)


def unpack_last(content: bytes) -> tuple[tuple[Kept, ...], int]:
    """The chunks and the depth. Raises SnapshotInvalid."""
    try:
        depth, count = _COUNTS.unpack_from(content)
        begin, kept = _COUNTS.size, []
        for _ in range(count):
            start, steps, digest, length = _KEPT.unpack_from(content, begin)
            begin += _KEPT.size + length
            kept.append(Kept(start, steps, digest, content[begin - length : begin]))
    except struct.error as error:
        raise SnapshotInvalid("the chunks stored of a session are damaged") from error
    if begin != len(content):
        raise SnapshotInvalid("the chunks stored of a session are damaged")
    return tuple(kept), depth


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM).digest()
