"""Sealed snapshots, which clients keep between steps. The signature proves that a server created the snapshot.

offset  size  field (little-endian)
0       8     header, see `envelope.py`: magic "UNRH", format version 1, tag n: length of the session id
8       4     id of the key: the first bytes of its SHA-256
12      n     the session id
12+n    m     the snapshot, see `snapshot.py`
12+n+m  32    HMAC-SHA256 of all preceding bytes
"""

import hashlib
import hmac
from collections.abc import Sequence

from unroll.service.core.errors import InvalidRequest, SnapshotInvalid
from unroll.service.state.envelope import HEADER_BYTES, Envelope
from unroll.service.state.snapshot import Snapshot

_KEY_ID = 4
_ENVELOPE = Envelope(b"UNRH", 1, "a sealed snapshot", _KEY_ID, tags=256)
_NAME = HEADER_BYTES + _KEY_ID
_SIGNATURE = 32
#: The length is stored as the tag.
_MOST_NAME = 255


class SnapshotKeys:
    """Seals snapshots with the first key, and opens snapshots sealed with any key.

    To rotate keys, put the new one first. Remove the old one when no snapshot sealed with it is in use.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        assert keys
        self._by_id = {_key_id(key): key for key in reversed(keys)}
        self._first_id = _key_id(keys[0])

    def seal(self, session_id: str, snapshot: Snapshot) -> bytes:
        """Seal a snapshot for this session. Raises InvalidRequest if the id is too long."""
        name = session_id.encode()
        if len(name) > _MOST_NAME:
            raise InvalidRequest(f"the id of a client-held session must not exceed {_MOST_NAME} bytes in UTF-8")
        content = b"".join((_ENVELOPE.header(len(name)), self._first_id, name, snapshot.to_bytes()))
        return content + _signature(self._by_id[self._first_id], content)

    def open(self, session_id: str, content: bytes) -> bytes:
        """Return the snapshot inside, as bytes.

        Raises:
            SnapshotInvalid: None of the keys sealed it for this session.
        """
        body = content[:-_SIGNATURE]
        end = _NAME + _ENVELOPE.read_header(body)
        key = self._by_id.get(body[HEADER_BYTES:_NAME])
        if key is None or not hmac.compare_digest(_signature(key, body), content[-_SIGNATURE:]):
            raise SnapshotInvalid("the snapshot was not signed by a key of this server, or was modified")
        if body[_NAME:end] != session_id.encode():
            raise SnapshotInvalid("the snapshot belongs to another session")
        return body[end:]


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()[:_KEY_ID]


def _signature(key: bytes, content: bytes) -> bytes:
    return hmac.digest(key, content, "sha256")
