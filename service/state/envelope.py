"""The envelope of every binary format: identifies format and version, and detects damage.

offset  size  field (little-endian)
0       4     magic
4       2     format version
6       1     tag: a number defined by the format; 0 in formats without one
7       1     reserved, 0
8             the format's content
end     16    BLAKE2b-128 of all preceding bytes; a signed format has a signature instead, a store's entry a CRC-32 (4)

The checksum detects damage. It is no protection against an attacker, who can compute it.
"""

import hashlib
import struct
import zlib
from dataclasses import dataclass

from unroll.service.core.errors import SnapshotInvalid

_HEADER = struct.Struct("<4sHBB")
_CHECKSUM, _CRC = 16, 4
#: Copying a hash object takes half the time of creating one.
_NOTHING = hashlib.blake2b(digest_size=_CHECKSUM)

#: Bytes before a format's content.
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True, slots=True)
class Envelope:
    """One binary format.

    Attributes:
        magic: The first four bytes of every file or message in this format.
        version: The version that is written, and the only one that is read.
        name: The format's name in error messages, such as "a snapshot".
        fields: Minimum number of bytes of content.
        tags: Number of tags.
        crc: The checksum is a CRC-32, which costs a quarter of BLAKE2b.
    """

    magic: bytes
    version: int
    name: str
    fields: int
    tags: int = 1
    crc: bool = False

    def header(self, tag: int = 0) -> bytes:
        return _HEADER.pack(self.magic, self.version, tag, 0)

    def read_header(self, content: bytes) -> int:
        """Check the header, and return its tag. content: from the header on, without checksum.

        Raises:
            SnapshotInvalid: The content is too short, or in another format or version.
        """
        if len(content) < HEADER_BYTES + self.fields or content[:4] != self.magic:
            raise SnapshotInvalid(f"not {self.name}")
        _, version, tag, reserved = _HEADER.unpack_from(content)
        if version != self.version or reserved or tag >= self.tags:
            raise SnapshotInvalid(f"{self.name} in format {version}; this server reads format {self.version}")
        return tag

    def seal(self, content: bytes) -> bytes:
        if self.crc:
            return content + zlib.crc32(content).to_bytes(_CRC, "little")
        return content + checksum(content).digest()

    def unseal(self, content: bytes) -> bytes:
        """The inverse of `seal`.

        Raises:
            SnapshotInvalid: The content is in another format or version, or damaged.
        """
        body = content[: -_CRC if self.crc else -_CHECKSUM]
        self.read_header(body)
        if self.seal(body) != content:
            raise SnapshotInvalid(f"{self.name} is damaged: the checksum does not match")
        return body


def checksum(content: bytes = b"") -> "hashlib.blake2b":
    """Return a running checksum that starts with `content`."""
    running = _NOTHING.copy()
    running.update(content)
    return running
