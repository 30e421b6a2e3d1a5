"""The embedded store: durable sessions in a local folder, for the processes of one host, without a database server.

The folder is an LMDB database (`lmdb_folder.py`) with one entry per session (`embedded_entry.py`).

A thread reads and writes, so the event loop never waits for the disk. Calls that arrive while it is busy share its next
transaction, in order; each succeeds or fails by itself. The exception is `newer`, for records that are in memory.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import structlog

from unroll.service.core.choices import Sync
from unroll.service.core.errors import InvalidRequest, SnapshotInvalid, StoreUnavailable, UnrollError
from unroll.service.core.session_ids import mark
from unroll.service.store.daemon_thread import DaemonThread
from unroll.service.store.embedded_entry import (
    CLOCK,
    CLOSED,
    EXPIRED,
    POSITION,
    SESSION,
    TIME,
    Entry,
    agreed_offset,
    expiry,
    key_of,
    name_of,
    pack_entry,
    place_of,
    since_boot,
    this_boot,
    token_of,
)
from unroll.service.store.exchanges import Exchanges, unavailable
from unroll.service.store.interface import Commit, Key, Listed, Page, Store, Tokens, refused_commit
from unroll.service.store.lmdb_folder import LmdbFolder
from unroll.service.store.record import Gone, Record, pack_last, unpack_trace

_log = structlog.get_logger(__name__)

#: Seconds between syncs, and between sweeps for ended entries.
_PERIOD = 1.0
#: Maximum number of entries that a sweep or page reads, and that a sweep removes; commits wait in the meantime.
_LOOKED, _REMOVED = 2000, 500
#: Number of ended entries after which another sweep follows immediately, and seconds per period for such sweeps.
_MANY, _LOOKING_SECONDS = 200, 0.1
#: Number of successful attempts to take a record that are remembered for retries.
_TAKEN = 1000
#: Seconds for which a shutdown waits for the thread, which may wait for another process.
_PATIENCE = 5.0


@dataclass(slots=True)
class _Call:
    """work: called with a transaction and the store's time. reads: it does not write."""

    work: Callable[[Any, float], Any]
    reads: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddedStoreConfig:
    """sync: when commits reach the disk. For timeout, idle_timeout and tombstone_life see RedisStoreConfig."""

    folder: Path
    sync: Sync = "everysec"
    timeout: float = 0.5
    idle_timeout: float | None = 900.0
    tombstone_life: float = 3600.0


class EmbeddedStore(Store):
    """Raises StoreUnavailable if the folder cannot be used."""

    def __init__(self, config: EmbeddedStoreConfig) -> None:
        self._config = config
        self._life = math.inf if config.idle_timeout is None else config.idle_timeout
        self._folder = LmdbFolder(config.folder, config.sync)
        self._offset = self._folder.write(agreed_offset)
        self._thread = DaemonThread("store")
        self._tokens = Tokens()
        # One transaction at a time. A late one cannot be cancelled: it may wait for a stopped process.
        self._exchanges = Exchanges(self._transact, (lmdb.Error, OSError), config.timeout, most=1, cancels=False)
        self.figures = self._exchanges.figures
        self.figures.bytes = self._folder.sizes()
        self._maintenance: asyncio.Task[None] | None = None
        self._full: StoreUnavailable | None = None  # the error for calls that need space
        self._taken: deque[bytes] = deque(maxlen=_TAKEN)  # recent attempts that took a record
        self._swept = b""  # position of the sweep
        self._many_ended = False  # the last sweep found many ended entries

    def __repr__(self) -> str:
        return f"<EmbeddedStore {self._config.folder}, {self._exchanges!r}>"

    async def start(self) -> None:
        self._maintenance = asyncio.create_task(self._maintain(), name="store")

    async def stop(self) -> None:
        if self._maintenance is not None:
            self._maintenance.cancel()
            await asyncio.wait([self._maintenance])
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._exchanges.finish()
                await self._thread.call(self._folder.close)
        except TimeoutError:
            _log.error("store not closed", store=str(self._config.folder), reason="another process has it")
            return
        self._thread.end()

    async def commit(self, commits: Sequence[Commit]) -> list[UnrollError | None]:
        call = _Call(partial(self._commit_all, commits))
        return await self._exchanges.counted(len(commits), self._exchanges.ask_one(call))

    async def load_all(self, keys: Sequence[Key]) -> list[Record | Gone | UnrollError | None]:
        return await self._exchanges.ask_one(_Call(partial(self._load_all, keys), reads=True))

    def newer(self, key: Key, token: bytes) -> Record | None:
        """Not in the thread: sessions are compared that other processes update, so their records are in memory."""
        if (content := self._folder.get_at_once(place_of(name_of(key)))) is None:
            return None
        its_token, is_living = token_of(content, self._now())
        return _intact(content) if is_living and its_token != token else None

    async def close(self, key: Key, origin: bytes = b"") -> int | None:
        return await self._exchanges.ask_one(_Call(partial(self._close, name_of(key), origin, self._tokens.next())))

    async def take(self, key: Key, token: bytes, attempt: bytes = b"") -> bool:
        return await self._exchanges.ask_one(_Call(partial(self._take, name_of(key), token, attempt)))

    async def page(self, after: str, limit: int, tenant: str | None = None) -> Page:
        try:
            place = bytes.fromhex(after)
        except ValueError:
            raise InvalidRequest(f"unknown page {after!r}; use `after` of the previous page") from None
        return await self._exchanges.ask_one(
            _Call(partial(_page, place, limit, mark(tenant).encode() if tenant else b""), reads=True)
        )

    # ── the thread ───────────────────────────────────────────────────────────────────────────────

    async def _transact(self, calls: list[_Call]) -> list[Any]:
        return await self._thread.call(partial(self._run, calls))

    def _run(self, calls: list[_Call]) -> list[Any]:

        def work(transaction: Any) -> list[Any]:
            now = self._now()
            return [call.work(transaction, now) for call in calls]

        if all(call.reads for call in calls):
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
        failed = False
        while True:
            await asyncio.sleep(_PERIOD)
            try:
                await self._thread.call(self._look_after)
                begun = time.monotonic()
                while self._many_ended and time.monotonic() - begun < _LOOKING_SECONDS:
                    await self._thread.call(self._sweep)
                if failed:  # other failures are noted by the next exchange
                    self._exchanges.note(None)
                failed = False
            except Exception as reason:  # noqa: BLE001 syncs must continue
                failed = True
                if not isinstance(reason, (lmdb.Error, OSError)):
                    _log.error("unexpected error of the store", exc_info=reason)
                self._exchanges.note(reason)

    def _look_after(self) -> None:
        """In the thread: remove ended entries, store the time, and sync."""
        self.figures.bytes = self._folder.sizes()
        if self._full is not None:
            if not self._folder.reserve():
                return
            self._full = None
        self._sweep()
        if self._folder.has_changed():
            clock = TIME.pack(this_boot(), self._offset, self._now())
            self._folder.write(lambda transaction: transaction.put(CLOCK, clock))
            self._folder.mark()

    def _sweep(self) -> None:
        """In the thread: reduce some expired sessions to traces, and remove some expired traces."""
        now = self._now()
        with self._folder.read() as transaction:
            ended, self._swept = _ended(transaction, self._swept, now)
        self._many_ended = len(ended) >= _MANY
        if ended:
            self._folder.write(partial(self._clean, ended, now))

    def _clean(self, ended: list[bytes], now: float, transaction: Any) -> None:
        for place in ended:
            found = Entry.at(transaction, place)
            if found is None or found.expires > now:
                continue
            life = found.expires + self._config.tombstone_life
            if found.kind != SESSION or life <= now or (trace := found.trace()) is None:
                transaction.delete(place)
            else:
                transaction.put(place, pack_entry(found.name, EXPIRED, life, found.token, trace))

    def _now(self) -> float:
        return self._offset + since_boot()

    # ── calls ────────────────────────────────────────────────────────────────────────────────────

    def _commit_all(self, commits: Sequence[Commit], transaction: Any, now: float) -> list[UnrollError | None]:
        """While the disk is full, only commits that close a session succeed."""
        full = self._full
        return [full if full and not commit.ends else self._commit(commit, transaction, now) for commit in commits]

    def _commit(self, commit: Commit, transaction: Any, now: float) -> UnrollError | None:
        name = name_of(commit.key)
        place = place_of(name)
        content = transaction.get(place)
        token, is_living = (b"", False) if content is None else token_of(content, now)
        if token == commit.token:
            return None
        if (token if is_living else b"") != commit.expected:
            return refused_commit(commit.key, _intact(content) if is_living else None)
        if commit.ends:
            origin, position, last = unpack_trace(commit.content)
            body = POSITION.pack(position) + origin + last
            entry = pack_entry(name, CLOSED, now + self._config.tombstone_life, commit.token, body)
        else:
            entry = pack_entry(name, SESSION, now + self._life, commit.token, commit.content)
        transaction.put(place, entry)
        return None

    def _load_all(self, keys: Sequence[Key], transaction: Any, now: float) -> list[Record | Gone | UnrollError | None]:
        return [self._load(name_of(key), transaction, now) for key in keys]

    def _load(self, name: bytes, transaction: Any, now: float) -> Record | Gone | UnrollError | None:
        found = Entry.at(transaction, place_of(name))
        if found is None:
            return None
        try:
            return found.at_time(now, self._config.tombstone_life)
        except SnapshotInvalid as error:
            return error

    def _close(
        self, name: bytes, origin: bytes, token: bytes, transaction: Any, now: float
    ) -> int | UnrollError | None:
        place = place_of(name)
        held = Entry.at(transaction, place)
        if held is None or not held.is_living(now):
            return None
        trace = held.trace()
        if trace is None:
            transaction.delete(place)
            return SnapshotInvalid("the stored session was damaged; it is removed")
        if origin not in (b"", trace[POSITION.size :]):
            return None
        body = trace + pack_last(1, ())
        transaction.put(place, pack_entry(name, CLOSED, now + self._config.tombstone_life, token, body))
        return POSITION.unpack_from(trace)[0]

    def _take(self, name: bytes, token: bytes, attempt: bytes, transaction: Any, now: float) -> bool:
        place = place_of(name)
        held = Entry.at(transaction, place)
        if held is not None and held.is_living(now) and held.token == token:
            self._taken.append(attempt)
            return transaction.delete(place)
        return attempt != b"" and attempt in self._taken


def _intact(content: Any) -> Record | None:
    """The record in an entry; None if it is damaged."""
    try:
        return Entry.read(bytes(content)).record()
    except SnapshotInvalid:
        return None


def _page(after: bytes, limit: int, own: bytes, transaction: Any, now: float) -> Page:
    """own: prefix of the session ids."""
    page = Page([], [], "")
    for looked, (place, value) in enumerate(_following(transaction.cursor(), after, own), 1):
        if place != CLOCK and (entry := Entry.read(bytes(value))).is_living(now):
            try:
                record = entry.record()
                expires_in = None if math.isinf(entry.expires) else entry.expires - now
                about = record.origin.model, record.origin.durability, record.position
                page.sessions.append(Listed(key_of(entry.name), *about, expires_in, len(entry.content)))
            except SnapshotInvalid:
                page.damaged.append(key_of(place))
        if len(page.sessions) == limit or looked == _LOOKED:
            return replace(page, after=place.hex())
    return page


def _following(cursor: Any, after: bytes, own: bytes) -> Iterator[tuple[bytes, Any]]:
    """The entries after a place, skipping those with session ids that do not start with `own`."""
    found = cursor.set_range(after + b"\0")
    while found:
        place = bytes(cursor.key())
        model, slash, session_id = place.partition(b"/")
        if slash and not session_id.startswith(own):
            found = cursor.set_range(model + (b"/" + own if session_id < own else b"0"))  # 0 follows / in ASCII
        else:
            yield place, cursor.value()
            found = cursor.next()


def _ended(transaction: Any, after: bytes, now: float) -> tuple[list[bytes], bytes]:
    """The places of ended entries among the next ones, and the last examined place; empty at the end."""
    found: list[bytes] = []
    place = after
    cursor = transaction.cursor()
    if not cursor.set_range(after + b"\0"):
        return [], b""
    for looked, (key, value) in enumerate(cursor):
        if looked == _LOOKED or len(found) == _REMOVED:
            return found, place
        place = bytes(key)
        if place != CLOCK and expiry(value) <= now:
            found.append(place)
    return found, b""
