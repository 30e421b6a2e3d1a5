"""The frame around every binary format: which format it is, in which version, and whether it is complete.

offset  size  field (little-endian)
0       4     magic
4       2     format version
6       1     tag: one number of the format's own; 0 in formats without one
7       1     reserved, 0
8             the format's content
end     16    BLAKE2b-128 of all the bytes before; a signed format has its signature instead
"""

import hashlib
import struct
from dataclasses import dataclass

from unroll.service.core.errors import SnapshotInvalid

_HEADER = struct.Struct("<4sHBB")
_CHECKSUM = 16
#: A copy of it takes half the time of a new one.
_NOTHING = hashlib.blake2b(digest_size=_CHECKSUM)

#: Bytes before a format's content.
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True, slots=True)
class Envelope:
    """One binary format.

    Attributes:
        magic: Four bytes that every file or message of this format starts with.
        version: The version that is written, and the only one that is read.
        name: The format in error messages, such as "a snapshot".
        fields: Least bytes of content.
        tags: Tags are below this number.
    """

    magic: bytes
    version: int
    name: str
    fields: int
    tags: int = 1

    def header(self, tag: int = 0) -> bytes:
        return _HEADER.pack(self.magic, self.version, tag, 0)

    def read_header(self, content: bytes) -> int:
        """Return the tag.

        Args:
            content: Bytes from the header on, without checksum.

        Raises:
            SnapshotInvalid: They are too short, or in another format or version.
        """
        if len(content) < HEADER_BYTES + self.fields or content[:4] != self.magic:
            raise SnapshotInvalid(f"not {self.name}")
        _, version, tag, reserved = _HEADER.unpack_from(content)
        if version != self.version or reserved or tag >= self.tags:
            raise SnapshotInvalid(f"{self.name} in format {version}; this server reads format {self.version}")
        return tag

    def seal(self, content: bytes) -> bytes:
        return content + checksum(content).digest()

    def unseal(self, content: bytes) -> bytes:
        """Return the bytes that `seal` was given.

        Raises:
            SnapshotInvalid: They are in another format or version, or damaged.
        """
        body = content[:-_CHECKSUM]
        self.read_header(body)
        if checksum(body).digest() != content[-_CHECKSUM:]:
            raise SnapshotInvalid(f"{self.name} is damaged: the checksum does not match")
        return body


def checksum(content: bytes = b"") -> "hashlib.blake2b":
    """Return the running checksum of `content`, to be updated with the bytes that follow."""
    running = _NOTHING.copy()
    running.update(content)
    return running
