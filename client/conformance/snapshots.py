"""Snapshots and sealed snapshots, in the formats of a real server."""

import hashlib
import hmac
import struct

from unroll.client.conformance.refusals import Refusal

_SNAPSHOT = struct.Struct("<4sHBB32sQIf")  # magic, version, tag, reserved; digest, position, values, the state
_SEAL = struct.Struct("<4sHBB4s")  # magic, version, length of the session id, reserved; which key
_CHECKSUM, _SIGNATURE = 16, 32
_KEY = b"the key of the toy server"


def snapshot_of(digest: str, position: int, state: float) -> bytes:
    content = _SNAPSHOT.pack(b"UNRL", 1, 0, 0, bytes.fromhex(digest), position, 1, state)
    return content + _checksum(content)


def read_snapshot(content: bytes, digest: str) -> tuple[int, float]:
    """Read position and state. Raises Refusal."""
    body = content[:-_CHECKSUM]
    if len(body) != _SNAPSHOT.size or content != body + _checksum(body):
        raise Refusal("snapshot_invalid", "the snapshot is damaged, or is none")
    *_, model, position, _, state = _SNAPSHOT.unpack(body)
    if model.hex() != digest:
        raise Refusal("model_changed", "the snapshot was taken from another model")
    return position, state


def seal(session_id: str, snapshot: bytes) -> bytes:
    name = session_id.encode()
    content = _SEAL.pack(b"UNRH", 1, len(name), 0, b"toys") + name + snapshot
    return content + hmac.digest(_KEY, content, "sha256")


def unseal(session_id: str, sealed: bytes) -> bytes:
    """Extract the snapshot. Raises Refusal."""
    body, name = sealed[:-_SIGNATURE], session_id.encode()
    if not hmac.compare_digest(hmac.digest(_KEY, body, "sha256"), sealed[-_SIGNATURE:]):
        raise Refusal("snapshot_invalid", "the snapshot was not signed here, or was changed since")
    if body[_SEAL.size :][: len(name)] != name:
        raise Refusal("snapshot_invalid", "the snapshot belongs to another session")
    return body[_SEAL.size + len(name) :]


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM).digest()
