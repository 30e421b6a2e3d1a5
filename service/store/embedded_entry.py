"""The entry format of the embedded store, and its clock.

LMDB holds one entry per session, under MODEL/SESSION. Integers are little-endian.

header   see `envelope.py`: magic "UNRE", format version 2, tag: 0 session, 1 closed, 2 expired; 1 and 2 are traces
then     expires f64, the end of the session or trace; token 16 bytes; length of the name u16, the name
body     session: the record as in `record.py`; trace: position u64, origin, last
end      CRC-32 of all preceding bytes; in version 1, which is still read, BLAKE2b-128

Times are seconds on the store's own clock, which stops while the machine is off, and never jumps.
"""

import hashlib
import math
import struct
import time
from dataclasses import dataclass, replace
from typing import Any, Self

from unroll.service.core.errors import SessionClosed, SessionExpired, SnapshotInvalid
from unroll.service.state.envelope import HEADER_BYTES, Envelope
from unroll.service.store.interface import Key
from unroll.service.store.lmdb_folder import boot
from unroll.service.store.record import ORIGIN_BYTES, Gone, Origin, Record, unpack_last

POSITION = struct.Struct("<Q")
SESSION, CLOSED, EXPIRED = range(3)

_ENTRY, _TOKEN = struct.Struct("<d16sH"), struct.Struct("<Bxd16s")
_ENVELOPE = Envelope(b"UNRE", 2, "a session of the store", _ENTRY.size, tags=3, crc=True)
_FIRST = replace(_ENVELOPE, version=1, crc=False)
_HEADERS = tuple(map(_ENVELOPE.header, (SESSION, CLOSED, EXPIRED)))
_NAME = HEADER_BYTES + _ENTRY.size
_VERSION, _TAG = 4, 6

#: LMDB's limit of keys, in bytes. The key of a longer name is a part of the name and a hash.
_MOST_KEY, _KEPT_OF_NAME = 511, 400
#: The clock's key cannot be a session's, which starts with a model's name. Its value: hash of the boot, offset, time.
CLOCK, TIME = b"\0clock", struct.Struct("<16sdd")


@dataclass(slots=True)
class Entry:
    """A stored entry. Reading its body verifies the checksum."""

    content: bytes
    kind: int
    expires: float
    token: bytes
    name: bytes

    @classmethod
    def at(cls, transaction: Any, place: bytes) -> Self | None:
        return None if (found := transaction.get(place)) is None else cls.read(bytes(found))

    @classmethod
    def read(cls, content: bytes) -> Self:
        """Parse the header. An entry that is too short counts as a session, so that its use reports the damage."""
        if len(content) < _NAME:
            return cls(content, SESSION, math.inf, bytes(16), b"")
        expires, token, length = _ENTRY.unpack_from(content, HEADER_BYTES)
        return cls(content, content[_TAG], expires, token, content[_NAME : _NAME + length])

    def is_living(self, now: float) -> bool:
        return self.kind == SESSION and self.expires > now

    def body(self) -> bytes:
        """Raises SnapshotInvalid if the entry is damaged."""
        envelope = _FIRST if self.content[_VERSION:_TAG] == b"\x01\0" else _ENVELOPE
        return envelope.unseal(self.content)[_NAME + len(self.name) :]

    def record(self) -> Record:
        """The record of a session. Raises SnapshotInvalid if the entry is damaged."""
        return Record.unpack(self.body(), self.token)

    def gone(self) -> Gone:
        """The content of a trace. Raises SnapshotInvalid if the entry is damaged."""
        body, begin = self.body(), POSITION.size + ORIGIN_BYTES
        origin, last = Origin.from_bytes(body[POSITION.size : begin]), body[begin:]
        cause = SessionClosed if self.kind == CLOSED else SessionExpired
        return Gone(cause.code, origin, unpack_last(last)[0] if last else ())

    def trace(self) -> bytes | None:
        """Position and origin of a session as bytes; None if the entry is damaged."""
        try:
            record = self.record()
        except SnapshotInvalid:
            return None
        return POSITION.pack(record.position) + record.origin.to_bytes()

    def at_time(self, now: float, tombstone_life: float) -> Record | Gone | None:
        """The session or its end as of `now`; None if nothing is known. Raises SnapshotInvalid if damaged."""
        if self.kind != SESSION:
            gone = self.gone()
            return gone if self.expires > now else None
        record = self.record()
        if self.expires > now:
            return record
        return Gone(SessionExpired.code, record.origin) if self.expires + tombstone_life > now else None


def pack_entry(name: bytes, kind: int, expires: float, token: bytes, body: bytes) -> bytes:
    return _ENVELOPE.seal(b"".join((_HEADERS[kind], _ENTRY.pack(expires, token, len(name)), name, body)))


def token_of(content: Any, now: float) -> tuple[bytes, bool]:
    """The token of an entry, and whether the entry is an open session. Does not copy the content."""
    if len(content) < _NAME:
        return bytes(16), True
    tag, expires, token = _TOKEN.unpack_from(content, _TAG)
    return token, expires > now and tag == SESSION


def expiry(content: Any) -> float:
    """When the entry expires."""
    return math.inf if len(content) < _NAME else _ENTRY.unpack_from(content, HEADER_BYTES)[0]


def name_of(key: Key) -> bytes:
    return f"{key[0]}/{key[1]}".encode()


def key_of(name: bytes) -> Key:
    """The key in a name, as far as the name is readable."""
    model, _, session = name.decode(errors="replace").partition("/")
    return model, session


def place_of(name: bytes) -> bytes:
    """The LMDB key for a name."""
    if len(name) <= _MOST_KEY:
        return name
    return name[:_KEPT_OF_NAME] + b"\0" + hashlib.blake2b(name, digest_size=32).digest()


def agreed_offset(transaction: Any) -> float:
    """Store time minus time since boot, the same for all processes. A boot resumes the clock where it stopped."""
    known = transaction.get(CLOCK)
    this, offset, last = TIME.unpack(known) if known is not None else (b"", 0.0, 0.0)
    if this != this_boot():
        offset = last - since_boot()
        transaction.put(CLOCK, TIME.pack(this_boot(), offset, last))
    return offset


def this_boot() -> bytes:
    return hashlib.blake2b(boot().encode(), digest_size=16).digest()


def since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
