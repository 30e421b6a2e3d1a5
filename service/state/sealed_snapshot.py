"""A snapshot that a client keeps between its steps, signed, so that what comes back is what was sent out.

offset  size  field (little-endian)
0       4     magic "UNRH"
4       2     format version, 1
6       1     n, length of the session id
7       1     reserved, 0
8       4     which key: the first bytes of its SHA-256
12      n     the session id
12+n    m     the snapshot, see `snapshot.py`
12+n+m  32    HMAC-SHA256 of all the bytes before
"""

import hashlib
import hmac
import struct
from collections.abc import Sequence

from unroll.service.core.errors import SnapshotInvalid
from unroll.service.state.snapshot import Snapshot

#: Bytes that a key must have.
LEAST_KEY_BYTES = 16

_HEADER = struct.Struct("<4sHBB4s")
_MAGIC, _VERSION = b"UNRH", 1
_SIGNATURE = 32


class SnapshotKeys:
    """The first key signs, all of them verify: so a new one is put first, and an old one removed when no snapshot that
    it signed can come any more."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        assert keys
        self._by_id = {_key_id(key): key for key in reversed(keys)}
        self._signs = _key_id(keys[0])

    def seal(self, session_id: str, snapshot: Snapshot) -> bytes:
        name = session_id.encode()
        header = _HEADER.pack(_MAGIC, _VERSION, len(name), 0, self._signs)
        content = header + name + snapshot.to_bytes()
        return content + _signature(self._by_id[self._signs], content)

    def open(self, session_id: str, content: bytes) -> bytes:
        """The snapshot inside. Raises SnapshotInvalid if it was not sealed by one of the keys for this session."""
        body = content[:-_SIGNATURE]
        if len(body) < _HEADER.size or body[:4] != _MAGIC:
            raise SnapshotInvalid("this is not a snapshot that a client holds")
        _, version, length, reserved, key_id = _HEADER.unpack_from(body)
        key = self._by_id.get(key_id)
        if key is None or not hmac.compare_digest(_signature(key, body), content[-_SIGNATURE:]):
            raise SnapshotInvalid("the snapshot was not signed by a key of this server, or was changed since")
        if (version, reserved) != (_VERSION, 0):
            raise SnapshotInvalid(f"snapshot format {version}; this server reads format {_VERSION}")
        begin = _HEADER.size + length
        if body[_HEADER.size : begin] != session_id.encode():
            raise SnapshotInvalid("the snapshot is of another session")
        return body[begin:]


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()[:4]


def _signature(key: bytes, content: bytes) -> bytes:
    return hmac.digest(key, content, "sha256")
