"""State files: a server writes its sessions at shutdown, and the next one reads them. Also `unroll sessions export`.

header   see `envelope.py`: magic "UNRS", format version 1; then records u64
each     idle seconds f64, lengths of the model's name u16, of the session id u16, of the record u32; then those
end      BLAKE2b-128 of all preceding bytes

The content is written to `NAME.part`, which is then renamed, so a file `NAME` is always complete. `NAME.part` exists
from the start of the server: it proves that the folder is writable, and its lock excludes other servers.
"""

import fcntl
import itertools
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import structlog

from unroll.service.core.errors import SnapshotInvalid
from unroll.service.state.envelope import HEADER_BYTES, Envelope, checksum
from unroll.service.store.interface import Key
from unroll.service.store.record import Record

_COUNT = struct.Struct("<Q")
_ENVELOPE = Envelope(b"UNRS", 1, "a state file", _COUNT.size)
_ENTRY = struct.Struct("<dHHI")

_log = structlog.get_logger(__name__)


class StateFile:
    """The state file of one server: `read`, `remove` once the sessions are served, `write`, `close`.

    Args:
        path: The file, which may not exist yet; its folder must.

    Raises:
        OSError: The file cannot be written, or another server uses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._beside = self.path.with_name(self.path.name + ".part")
        try:
            if self.path.exists() and not self.path.is_file():
                raise OSError("it is not a file; specify a file in a folder that the server can write to")
            self._file: BinaryIO = os.fdopen(os.open(self._beside, os.O_RDWR | os.O_CREAT, 0o600), "w+b")
        except OSError as error:
            raise OSError(f"the state file {path} cannot be written: {error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._file.fileno()), self._beside.stat()):
                raise BlockingIOError  # another server has just renamed it
            os.fchmod(self._file.fileno(), 0o600)
            self._file.write(bytes(2**16))  # detects a full disk now
            self._file.flush()
            os.fsync(self._file.fileno())
        except (BlockingIOError, FileNotFoundError):
            self._file.close()
            raise OSError(f"another server uses the state file {path}: each server needs its own") from None
        except OSError as error:
            self.close()
            raise OSError(f"the state file {path} cannot be written: {error}") from error

    def read(self) -> list[tuple[Key, Record, float]]:
        """The sessions in the file, which stays; none if there is no file. A damaged file is renamed.

        Raises:
            OSError: The file cannot be read.
        """
        try:
            return read(self.path)
        except FileNotFoundError:
            return []
        except SnapshotInvalid as error:
            names = (self.path.with_name(f"{self.path.name}.unreadable-{n}") for n in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            self.path.rename(aside)
            self._sync_folder()
            _log.error("state file not read: its sessions are unknown here", reason=error.message, moved_to=str(aside))
            return []

    def remove(self) -> None:
        """Remove the file. Its sessions change from now on, and must not continue from old states after a crash."""
        self.path.unlink(missing_ok=True)
        self._sync_folder()

    def write(self, sessions: Iterable[tuple[Key, Record, float]]) -> int:
        """Write sessions to the file atomically, and close it.

        Args:
            sessions: Key, record, and idle seconds of each.

        Returns:
            The number of sessions.

        Raises:
            OSError: The file cannot be written; a previous file is unchanged.
        """
        self._file.seek(0)
        self._file.truncate()
        writer = Writer(self._file)
        for session in sessions:
            writer.add(*session)
        count = writer.finish()
        os.fsync(self._file.fileno())
        self._beside.replace(self.path)
        self._file.close()
        self._sync_folder()
        return count

    def close(self) -> None:
        """Close without writing."""
        if not self._file.closed:
            self._beside.unlink(missing_ok=True)
            with suppress(OSError):  # flushing again may fail again
                self._file.close()

    def _sync_folder(self) -> None:
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Writer:
    """Writes the content of a state file to an empty file: `add` each session, then `finish`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._count = 0
        file.write(_ENVELOPE.header() + _COUNT.pack(0))

    def add(self, key: Key, record: Record, idle: float) -> None:
        """idle: seconds since its last use."""
        content, model, session = record.to_bytes(), key[0].encode(), key[1].encode()
        self._file.write(_ENTRY.pack(idle, len(model), len(session), len(content)) + model + session + content)
        self._count += 1

    def finish(self) -> int:
        """Complete the file. Returns the number of sessions."""
        file = self._file
        file.seek(HEADER_BYTES)
        file.write(_COUNT.pack(self._count))
        file.seek(0)
        digest = checksum()
        while part := file.read(2**20):
            digest.update(part)
        file.seek(0, os.SEEK_END)
        file.write(digest.digest())
        file.flush()
        return self._count


def read(path: Path) -> list[tuple[Key, Record, float]]:
    """Read all sessions of a file: key, record, and idle seconds of each.

    Raises:
        SnapshotInvalid: The file is damaged.
        OSError: It cannot be read.
    """
    content = path.read_bytes()
    try:
        body = _ENVELOPE.unseal(content)
    except SnapshotInvalid as error:
        raise SnapshotInvalid(f"{path}: {error.message}") from error
    try:
        return _entries(body)
    except (struct.error, UnicodeDecodeError, SnapshotInvalid) as error:
        raise SnapshotInvalid(f"{path}: {error}") from error


def _entries(body: bytes) -> list[tuple[Key, Record, float]]:
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
