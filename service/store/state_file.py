"""Sessions in a file: a server that ends writes it, and the next one reads it.

header   see `envelope.py`: magic "UNRS", format version 1; then records u64
each     idle seconds f64, lengths of the model's name u16, of the session id u16, of the record u32; then those
end      BLAKE2b-128 of all the bytes before

The file is written under a temporary name and then moved, so a file under its own name is complete.
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path

from unroll.service.core.errors import SnapshotInvalid
from unroll.service.state.envelope import HEADER_BYTES, Envelope, checksum
from unroll.service.store.interface import Key
from unroll.service.store.record import Record

_COUNT = struct.Struct("<Q")
_ENVELOPE = Envelope(b"UNRS", 1, "a state file", _COUNT.size)
_ENTRY = struct.Struct("<dHHI")


def write(path: Path, sessions: Iterable[tuple[Key, Record, float]]) -> int:
    """Write sessions to a file.

    Args:
        path: The file; one that exists is replaced.
        sessions: Key, record, and seconds without use of each.

    Returns:
        How many there were.

    Raises:
        OSError: The file cannot be written.
    """
    count = 0
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w+b") as file:
        file.write(_ENVELOPE.header() + _COUNT.pack(0))
        for (name, session_id), record, idle in sessions:
            content, model, session = record.to_bytes(), name.encode(), session_id.encode()
            file.write(_ENTRY.pack(idle, len(model), len(session), len(content)) + model + session + content)
            count += 1
        file.seek(HEADER_BYTES)
        file.write(_COUNT.pack(count))
        file.seek(0)
        digest = checksum()
        while part := file.read(2**20):
            digest.update(part)
        file.seek(0, os.SEEK_END)
        file.write(digest.digest())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return count


def read(path: Path) -> list[tuple[Key, Record, float]]:
    """Read all sessions of a file: key, record, and seconds without use of each.

    Raises:
        SnapshotInvalid: The file is damaged.
        OSError: It cannot be read.
    """
    content = path.read_bytes()
    try:
        body = _ENVELOPE.unseal(content)
    except SnapshotInvalid as error:
        raise SnapshotInvalid(f"{path}: {error.message}") from error
    (count,) = _COUNT.unpack_from(body, HEADER_BYTES)
    sessions, begin = [], HEADER_BYTES + _COUNT.size
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
