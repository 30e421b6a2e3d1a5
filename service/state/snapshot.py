"""A session's state as bytes: versioned, bound to its model, checksummed.

offset  size  field (little-endian)
0       8     header, see `envelope.py`: magic "UNRL", format version 1
8       32    SHA-256 of the model
40      8     position, unsigned
48      4     values in the row
52      4n    the row, float32
52+4n   16    BLAKE2b-128 of all preceding bytes
"""

import struct
from dataclasses import dataclass
from typing import Self

import numpy as np

from unroll.service.core.errors import ModelChanged, SnapshotInvalid
from unroll.service.state.envelope import HEADER_BYTES, Envelope

_FIELDS = struct.Struct("<32sQI")
_ENVELOPE = Envelope(b"UNRL", 1, "a snapshot", _FIELDS.size)
_ROW = HEADER_BYTES + _FIELDS.size
_MAX_POSITION = 2**63 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A session's state.

    Attributes:
        digest: SHA-256 of the model, hexadecimal.
        position: Time steps consumed.
        row: The state row, (state_size,) float32.
    """

    digest: str
    position: int
    row: np.ndarray

    def to_bytes(self) -> bytes:
        fields = _FIELDS.pack(bytes.fromhex(self.digest), self.position, self.row.size)
        return _ENVELOPE.seal(_ENVELOPE.header() + fields + self.row.astype("<f4").tobytes())

    @staticmethod
    def model_of(content: bytes) -> str:
        """Return the digest of the snapshot's model, without validating the snapshot."""
        return content[HEADER_BYTES : HEADER_BYTES + 32].hex()

    @classmethod
    def checked_model_of(cls, content: bytes) -> str:
        """Like `model_of`, but raises SnapshotInvalid if the snapshot is damaged."""
        return cls.model_of(_ENVELOPE.unseal(content))

    @classmethod
    def from_bytes(cls, content: bytes, *, digest: str, state_size: int) -> Self:
        """Read a snapshot of the model `digest` with `state_size` values per row.

        Raises:
            SnapshotInvalid: The snapshot is damaged.
            ModelChanged: It belongs to another model.
        """
        body = _ENVELOPE.unseal(content)
        model, position, size = _FIELDS.unpack_from(body, HEADER_BYTES)
        if model.hex() != digest:
            raise ModelChanged("the snapshot was taken from another model or version")
        fits = size == state_size and len(body) == _ROW + 4 * size
        if (
            not fits
            or position > _MAX_POSITION
            or not np.isfinite(row := np.frombuffer(body, "<f4", offset=_ROW)).all()
        ):
            raise SnapshotInvalid("the snapshot is inconsistent, or does not match the model's state row")
        return cls(digest, position, row)
