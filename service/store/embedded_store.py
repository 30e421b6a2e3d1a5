"""Durable sessions in a folder of this machine: for the processes of one host, without a second server.

One entry per session, in LMDB, under MODEL/SESSION. Integers are little-endian.

header   see `envelope.py`: magic "UNRE", format version 1, tag: 0 the session, 1 it was closed, 2 it expired
then     expires f64: the session, or this trace of it; token 16 bytes; length of the name u16, the name
body     of a session: the record as in `record.py`; of a trace: position u64, origin, last
end      BLAKE2b-128 of all the bytes before

Times are seconds on the store's own clock, which stands still while the machine is off, and never jumps.

A thread reads and writes, so the event loop never waits for the disk. Calls that arrive while it works go together into
its next transaction: in order, each for itself.
"""

import asyncio
import hashlib
import math
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import lmdb
import structlog

from unroll.service.core.errors import (
    SessionClosed,
    SessionContended,
    SessionExpired,
    SnapshotInvalid,
    StoreUnavailable,
    UnrollError,
)
from unroll.service.state.envelope import HEADER_BYTES, Envelope
from unroll.service.store.exchanges import Exchanges, unavailable
from unroll.service.store.interface import Commit, Key, Tokens
from unroll.service.store.lmdb_folder import LmdbFolder, Sync, boot
from unroll.service.store.record import ORIGIN_BYTES, Gone, Origin, Record, pack, pack_last, unpack_last

_log = structlog.get_logger(__name__)

_ENTRY = struct.Struct("<d16sH")
_POSITION = struct.Struct("<Q")
_SESSION, _CLOSED, _EXPIRED = range(3)
_ENVELOPE = Envelope(b"UNRE", 1, "a session of the store", _ENTRY.size, tags=3)
_NAME = HEADER_BYTES + _ENTRY.size
_TAG = 6

#: LMDB's limit, in bytes. A longer name is stored under a part of it and a hash.
_MOST_KEY, _KEPT_OF_NAME = 511, 400
#: Not the name of a session, which begins with a model's. Its value: a hash of the boot, offset and time of the clock.
_CLOCK, _TIME = b"\0clock", struct.Struct("<16sdd")
#: Seconds between syncs, and between looks at old entries; entries per look.
_PERIOD, _SWEPT = 1.0, 2000


@dataclass(frozen=True, slots=True)
class _Call:
    """work: within a transaction, at the store's time.

    does: it reads, or ends a session, which a full disk must not prevent, or writes.
    """

    work: Callable[[Any, float], Any]
    does: Literal["reads", "ends", "writes"]


@dataclass(frozen=True, slots=True)
class EmbeddedStoreConfig:
    """sync: when commits reach the disk. timeout, idle_timeout, tombstone_life: as in RedisStoreConfig."""

    folder: Path
    sync: Sync = "everysec"
    timeout: float = 0.5
    idle_timeout: float | None = 900.0
    tombstone_life: float = 3600.0


class EmbeddedStore:
    """Raises StoreUnavailable if the folder cannot be used."""

    def __init__(self, config: EmbeddedStoreConfig) -> None:
        self._config = config
        self._folder = LmdbFolder(config.folder, config.sync)
        self._offset = self._folder.write(_agreed_offset)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._tokens = Tokens()
        # One transaction at a time. A late one cannot be cancelled: another process may have stopped within its own.
        self._exchanges = Exchanges(self._transact, (lmdb.Error, OSError), config.timeout, most=1, cancels=False)
        self._maintenance: asyncio.Task[None] | None = None
        self._full: StoreUnavailable | None = None  # the answer to calls that need space
        self._swept = b""  # entries up to here were looked at

    def __repr__(self) -> str:
        return f"<EmbeddedStore {self._config.folder}, {self._exchanges!r}>"

    async def start(self) -> None:
        self._maintenance = asyncio.create_task(self._maintain(), name="store")

    async def stop(self) -> None:
        if self._maintenance is not None:
            self._maintenance.cancel()
            await asyncio.wait([self._maintenance])
        await self._exchanges.finish()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._folder.close)
        self._thread.shutdown()

    async def commit(self, commits: Sequence[Commit]) -> list[UnrollError | None]:
        try:
            return await self._exchanges.ask(
                [_Call(partial(self._commit, commit), "ends" if commit.ends else "writes") for commit in commits]
            )
        except StoreUnavailable as error:
            return [error] * len(commits)

    async def load(self, key: Key) -> Record | Gone | None:
        return await self._exchanges.ask_one(_Call(partial(self._load, _name(key)), "reads"))

    async def close(self, key: Key) -> int | None:
        return await self._exchanges.ask_one(_Call(partial(self._close, _name(key), self._tokens.next()), "ends"))

    async def take(self, key: Key, token: bytes) -> bool:
        return await self._exchanges.ask_one(_Call(partial(_take, _name(key), token), "ends"))

    # ── the thread ───────────────────────────────────────────────────────────────────────────────

    async def _transact(self, calls: list[_Call]) -> list[Any]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, calls)

    def _run(self, calls: list[_Call]) -> list[Any]:
        """In the thread: all calls in one transaction; while the disk is full, only those that end sessions."""

        def work(transaction: Any) -> list[Any]:
            now = self._now()
            refused = self._full
            return [refused if refused and call.does == "writes" else call.work(transaction, now) for call in calls]

        if all(call.does == "reads" for call in calls):
            with self._folder.read() as transaction:
                return work(transaction)
        if self._full is None:
            try:
                return self._folder.write(work)
            except lmdb.PanicError:
                raise
            except lmdb.Error as reason:  # LMDB has several errors for a full disk
                self._full = unavailable(reason)
                self._folder.free_reserve()
        return self._folder.write(work)

    async def _maintain(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD)
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._look_after)
            except (lmdb.Error, OSError) as reason:
                self._exchanges.note(reason)

    def _look_after(self) -> None:
        """In the thread: remove traces that are old enough, note the time, and sync."""
        if self._full is not None:
            if not self._folder.reserve():
                return
            self._full = None
        now = self._now()
        with self._folder.read() as transaction:
            ended, self._swept = _ended(transaction, self._swept, now)
        if ended or self._folder.has_changed():
            self._folder.write(partial(self._clean, ended, now))
            self._folder.mark()

    def _clean(self, ended: list[bytes], now: float, transaction: Any) -> None:
        for place in ended:
            found = _Entry.at(transaction, place)
            if found is None or found.expires > now:
                continue
            life = found.expires + self._config.tombstone_life
            if found.kind != _SESSION or life <= now or (trace := found.trace()) is None:
                transaction.delete(place)
            else:
                transaction.put(place, _entry(found.name, _EXPIRED, life, found.token, trace))
        transaction.put(_CLOCK, _TIME.pack(_this_boot(), self._offset, now))

    def _now(self) -> float:
        return self._offset + _since_boot()

    # ── calls ────────────────────────────────────────────────────────────────────────────────────

    def _commit(self, commit: Commit, transaction: Any, now: float) -> UnrollError | None:
        name = _name(commit.key)
        place = _place(name)
        held = _Entry.at(transaction, place)
        if held is not None and held.token == commit.token:
            return None
        living = held.token if held is not None and held.is_living(now) else b""
        if living != commit.expected:
            return SessionContended(f"session {commit.key[1]!r} was updated by another replica; retry", 0.1)
        if commit.ends:
            kind, life = _CLOSED, self._config.tombstone_life
            body = _POSITION.pack(commit.position) + commit.origin + commit.last
        else:
            idle = self._config.idle_timeout
            kind, life = _SESSION, math.inf if idle is None else idle
            body = pack(commit.origin, commit.position, commit.row, commit.last)
        transaction.put(place, _entry(name, kind, now + life, commit.token, body))
        return None

    def _load(self, name: bytes, transaction: Any, now: float) -> Record | Gone | UnrollError | None:
        found = _Entry.at(transaction, _place(name))
        if found is None:
            return None
        try:
            body = found.body()
            if found.is_living(now):
                return Record.unpack(body, found.token)
            expires = found.expires
            if found.kind == _SESSION:
                expires += self._config.tombstone_life
                body = _POSITION.pack(0) + body[:ORIGIN_BYTES]
            begin = _POSITION.size + ORIGIN_BYTES
            origin, last = Origin.from_bytes(body[_POSITION.size : begin]), body[begin:]
        except SnapshotInvalid as error:
            return error
        cause = SessionClosed if found.kind == _CLOSED else SessionExpired
        return Gone(cause.code, origin, unpack_last(last)[0] if last else ()) if expires > now else None

    def _close(self, name: bytes, token: bytes, transaction: Any, now: float) -> int | UnrollError | None:
        place = _place(name)
        held = _Entry.at(transaction, place)
        if held is None or not held.is_living(now):
            return None
        trace = held.trace()
        if trace is None:
            transaction.delete(place)
            return SnapshotInvalid("the stored session was damaged; it is removed")
        body = trace + pack_last(1, ())
        transaction.put(place, _entry(name, _CLOSED, now + self._config.tombstone_life, token, body))
        return _POSITION.unpack_from(trace)[0]


def _take(name: bytes, token: bytes, transaction: Any, now: float) -> bool:
    place = _place(name)
    held = _Entry.at(transaction, place)
    return held is not None and held.is_living(now) and held.token == token and transaction.delete(place)


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry as it is stored. Its checksum is compared when its body is read."""

    content: bytes
    kind: int
    expires: float
    token: bytes
    name: bytes

    @classmethod
    def at(cls, transaction: Any, place: bytes) -> Self | None:
        if (found := transaction.get(place)) is None:
            return None
        content = bytes(found)
        expires, token, length = _ENTRY.unpack_from(content, HEADER_BYTES)
        return cls(content, content[_TAG], expires, token, content[_NAME : _NAME + length])

    def is_living(self, now: float) -> bool:
        return self.kind == _SESSION and self.expires > now

    def body(self) -> bytes:
        """Raises SnapshotInvalid if the entry is damaged."""
        return _ENVELOPE.unseal(self.content)[_NAME + len(self.name) :]

    def trace(self) -> bytes | None:
        """Position and origin of a session; None if it is damaged."""
        try:
            record = Record.unpack(self.body())
        except SnapshotInvalid:
            return None
        return _POSITION.pack(record.position) + record.origin.to_bytes()


def _entry(name: bytes, kind: int, expires: float, token: bytes, body: bytes) -> bytes:
    return _ENVELOPE.seal(_ENVELOPE.header(kind) + _ENTRY.pack(expires, token, len(name)) + name + body)


def _name(key: Key) -> bytes:
    return f"{key[0]}/{key[1]}".encode()


def _place(name: bytes) -> bytes:
    """LMDB's key."""
    if len(name) <= _MOST_KEY:
        return name
    return name[:_KEPT_OF_NAME] + b"\0" + hashlib.blake2b(name, digest_size=32).digest()


def _ended(transaction: Any, after: bytes, now: float) -> tuple[list[bytes], bytes]:
    """The places of ended entries among the next ones, and the last place that was looked at; empty at the end."""
    found: list[bytes] = []
    place = after
    cursor = transaction.cursor()
    if not cursor.set_range(after + b"\0"):
        return [], b""
    for looked, (key, value) in enumerate(cursor):
        if looked == _SWEPT:
            return found, place
        place = bytes(key)
        if place != _CLOCK and _ENTRY.unpack_from(value, HEADER_BYTES)[0] <= now:
            found.append(place)
    return found, b""


def _agreed_offset(transaction: Any) -> float:
    """Store time minus time since boot, the same for all processes; the clock goes on from where it stood."""
    known = transaction.get(_CLOCK)
    this, offset, last = _TIME.unpack(known) if known is not None else (b"", 0.0, 0.0)
    if this != _this_boot():
        offset = last - _since_boot()
        transaction.put(_CLOCK, _TIME.pack(_this_boot(), offset, last))
    return offset


def _this_boot() -> bytes:
    return hashlib.blake2b(boot().encode(), digest_size=16).digest()


def _since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
