"""Sessions in a file, from a server that ends to the one that begins: a header, and a record after another.

    header   magic "UNRS", format version u16, reserved u16, records u64
    each     idle seconds f64, lengths of the model's name u16, of the session id u16, of the record u32; then those
    end      BLAKE2b-128 of all the bytes before

A file is written whole beside its place and then moved there: what is there is complete.
"""

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from unroll.service.core.errors import SnapshotInvalid
from unroll.service.store.interface import Key
from unroll.service.store.record import Record

_HEADER = struct.Struct("<4sHHQ")
_ENTRY = struct.Struct("<dHHI")
_MAGIC, _VERSION = b"UNRS", 1
_CHECKSUM = 16


def write(path: Path, sessions: Iterable[tuple[Key, Record, float]]) -> int:
    """sessions: each with the seconds it was idle. Returns how many. Raises OSError."""
    count = 0
    beside = path.with_name(path.name + ".part")
    with beside.open("w+b") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, 0, 0))
        for (name, session_id), record, idle in sessions:
            content, model, session = record.to_bytes(), name.encode(), session_id.encode()
            file.write(_ENTRY.pack(idle, len(model), len(session), len(content)) + model + session + content)
            count += 1
        file.seek(0)
        file.write(_HEADER.pack(_MAGIC, _VERSION, 0, count))
        file.seek(0)
        digest = _new_digest()
        while part := file.read(2**20):
            digest.update(part)
        file.seek(0, os.SEEK_END)
        file.write(digest.digest())
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    return count


def read(path: Path) -> list[tuple[Key, Record, float]]:
    """All of them, or none. Raises SnapshotInvalid if the file is damaged, OSError if it cannot be read."""
    content = path.read_bytes()
    body = content[:-_CHECKSUM]
    if len(body) < _HEADER.size or body[:4] != _MAGIC:
        raise SnapshotInvalid(f"{path} is not a state file")
    if _new_digest(body).digest() != content[-_CHECKSUM:]:
        raise SnapshotInvalid(f"{path} is damaged: its checksum differs")
    _, version, reserved, count = _HEADER.unpack_from(body)
    if (version, reserved) != (_VERSION, 0):
        raise SnapshotInvalid(f"{path} has format {version}; this server reads format {_VERSION}")
    sessions, begin = [], _HEADER.size
    for _ in range(count):
        idle, *lengths = _ENTRY.unpack_from(body, begin)
        begin += _ENTRY.size
        parts = []
        for length in lengths:
            parts.append(body[begin : begin + length])
            begin += length
        name, session_id, record = parts
        sessions.append(((name.decode(), session_id.decode()), Record.from_bytes(record), idle))
    return sessions


def _new_digest(content: bytes = b"") -> "hashlib.blake2b":
    return hashlib.blake2b(content, digest_size=_CHECKSUM)
