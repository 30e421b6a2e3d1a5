"""A session's state as bytes: versioned, bound to its model, checksummed.

offset  size  field (little-endian)
0       4     magic "UNRL"
4       2     format version, 1
6       2     reserved, 0
8       32    SHA-256 of the model
40      8     position, unsigned
48      4     values in the row
52      4n    the row, float32
52+4n   16    BLAKE2b-128 of all the bytes before
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import Self

import numpy as np

from unroll.service.core.errors import ModelChanged, SnapshotInvalid

_HEADER = struct.Struct("<4sHH32sQI")
_MAGIC, _VERSION = b"UNRL", 1
_CHECKSUM = 16
_LARGEST_POSITION = 2**63 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    digest: str
    position: int
    row: np.ndarray  # (state_size,) float32

    def to_bytes(self) -> bytes:
        header = _HEADER.pack(_MAGIC, _VERSION, 0, bytes.fromhex(self.digest), self.position, self.row.size)
        content = header + self.row.astype("<f4").tobytes()
        return content + _checksum(content)

    @staticmethod
    def model_of(content: bytes) -> str:
        """The digest of the model that a snapshot says it belongs to."""
        return content[8:40].hex()

    @classmethod
    def from_bytes(cls, content: bytes, *, digest: str, state_size: int) -> Self:
        """Raises SnapshotInvalid if damaged, ModelChanged if it belongs to a model other than `digest`."""
        if len(content) < _HEADER.size + _CHECKSUM or content[:4] != _MAGIC:
            raise SnapshotInvalid("this is not a snapshot")
        body, checksum = content[:-_CHECKSUM], content[-_CHECKSUM:]
        if _checksum(body) != checksum:
            raise SnapshotInvalid("the snapshot is damaged: its checksum differs")
        _, version, reserved, model, position, size = _HEADER.unpack_from(body)
        if (version, reserved) != (_VERSION, 0):
            raise SnapshotInvalid(f"snapshot format {version}; this server reads format {_VERSION}")
        if model.hex() != digest:
            raise ModelChanged("the snapshot was taken from another model or version")
        row = np.frombuffer(body, "<f4", offset=_HEADER.size)
        if size != row.size or size != state_size or position > _LARGEST_POSITION or not np.isfinite(row).all():
            raise SnapshotInvalid("the snapshot contradicts itself or the model's state row")
        return cls(digest, position, row)


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM).digest()
