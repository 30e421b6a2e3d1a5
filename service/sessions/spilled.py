"""Spilled sessions: memory sessions without an arena row move to host memory, then to the store, and back when used.

A session is in one place at a time, because taking a record removes it. If there is no place, the session is evicted.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

import structlog

from unroll.service.core.clock import Clock
from unroll.service.core.errors import (
    SessionClosed,
    SessionEvicted,
    SessionExpired,
    SessionGone,
    StoreUnavailable,
    UnrollError,
)
from unroll.service.core.session_ids import shown, tenant_of
from unroll.service.models.served_model import ServedModel
from unroll.service.models.versions import ModelVersions
from unroll.service.scheduler.session import Session
from unroll.service.store.interface import Commit, Key, Store, Tokens
from unroll.service.store.record import Record
from unroll.service.store.state_file import StateFile

_log = structlog.get_logger(__name__)

#: Approximate overhead of a record, besides its row and its replies.
_RECORD_BYTES = 512
#: Maximum number of records to examine for one of a tenant.
_MOST_LOOKED_AT = 1000


class SpilledSessions:
    """The memory sessions without a row.

    Args:
        limit: Bytes of host memory.
        idle_timeout: Seconds until an idle session expires; None for never.
        versions: The versions that sessions come from and return to.
        store: Receives the sessions beyond the limit. Without one, they are evicted.

    Attributes:
        of_tenants: Number of sessions in host memory, by tenant.
    """

    def __init__(
        self, limit: int, idle_timeout: float | None, clock: Clock, versions: ModelVersions, store: Store | None
    ) -> None:
        self._limit = limit
        self._idle_timeout = idle_timeout
        self._clock = clock
        self._versions = versions
        self._store = store
        self._records: OrderedDict[Key, tuple[Record, float]] = OrderedDict()  # with the time of last use, oldest first
        self._bytes = 0
        self.of_tenants: Counter[str] = Counter()
        self._parking: dict[Key, tuple[Record, float]] = {}  # on their way to the store
        self._tokens = Tokens()
        self._tasks: dict[Key, asyncio.Task[None]] = {}  # the latest of each session
        self._finishing = False

    def __len__(self) -> int:
        return len(self._records) + len(self._parking)

    def __iter__(self) -> Iterator[tuple[Key, Record, float]]:
        """Yields key, record, and time of last use."""
        for records in (self._records, self._parking):
            yield from ((key, record, used) for key, (record, used) in records.items())

    def keys(self) -> list[Key]:
        return [*self._records, *self._parking]

    def get(self, key: Key) -> tuple[Record, float] | None:
        """The record and its time of last use, without side effects; None if it is not here."""
        return self._records.get(key) or self._parking.get(key)

    def _put(self, key: Key, record: Record, used: float) -> None:
        self._take(key)
        self._records[key] = record, used
        self._bytes += _size(record)
        self.of_tenants[tenant_of(key[1])] += 1

    def _take(self, key: Key) -> tuple[Record, float] | None:
        """Remove a record from host memory. Returns it and its time of last use."""
        found = self._records.pop(key, None)
        if found is not None:
            self._bytes -= _size(found[0])
            self.of_tenants -= Counter((tenant_of(key[1]),))
        return found

    def has(self, digest: str) -> bool:
        self.expire()
        return any(record.origin.model == digest for _, record, _ in self)

    # ── out of the arena and back ────────────────────────────────────────────────────────────────

    def take_in(self, model: ServedModel, session: Session, at_cost: bool) -> bool:
        """Keep an idle session that is about to lose its row.

        Args:
            at_cost: Whether the tenant's sessions, including this one, may be evicted to make room.

        Returns:
            False if there is no room for it.
        """
        if self._store is None and at_cost and not self._limit:
            return False
        record = model.record(session)
        if self._store is None and not at_cost and self._bytes + _size(record) > self._limit:
            return False
        self._put((model.name, session.id), record, session.last_used)
        self._make_room(tenant_of(session.id))
        return True

    def put(self, key: Key, record: Record) -> None:
        """Keep a session that was taken from the store but found no free row."""
        self._put(key, replace(record, token=b""), self._clock.now())
        self._make_room(tenant_of(key[1]))

    def bring_back(self, name: str, session_id: str) -> tuple[ServedModel, Session] | None:
        """Give the session a row again; None if it is not here, expired, or stranded.

        Raises:
            CapacityExhausted: There is no free row.
        """
        key = name, session_id
        if self.find_stranded(name, session_id) is not None:
            return None
        found = self._take(key) or self._parking.pop(key, None)
        if found is None:
            return None
        record, used = found
        if self._is_expired(used):
            self._add_closed(key, record, SessionExpired)
            return None
        try:
            model = self._versions.home(name, record.origin.model, f"session {shown(session_id)!r} runs on")
            session = model.adopt(session_id, record)
            model.scheduler.counters.adopted += 1
        except UnrollError:
            self._put(key, record, used)
            raise
        return model, session

    def find_stranded(self, name: str, session_id: str) -> Record | None:
        """The session, if it is here but its version is not."""
        found = self.get((name, session_id))
        if found is None or self._is_expired(found[1]):
            return None
        return found[0] if self._versions.with_digest(name, found[0].origin.model) is None else None

    def close_stranded(self, name: str, session_id: str) -> None:
        """Close the session if it is here, regardless of its version."""
        key = name, session_id
        if (found := self._take(key) or self._parking.pop(key, None)) is not None:
            self._add_closed(key, found[0], SessionClosed)

    # ── limits ───────────────────────────────────────────────────────────────────────────────────

    def expire(self) -> None:
        while self._records:
            key, (record, used) = next(iter(self._records.items()))
            if not self._is_expired(used):
                return
            self._take(key)
            self._add_closed(key, record, SessionExpired)

    def _is_expired(self, used: float) -> bool:
        return self._idle_timeout is not None and self._clock.now() - used >= self._idle_timeout

    def _make_room(self, tenant: str) -> None:
        """Move sessions beyond the limit to the store, or evict them. tenant: the tenant that must give up sessions."""
        while self._bytes > self._limit:
            own = (key for key in islice(self._records, _MOST_LOOKED_AT) if tenant_of(key[1]) == tenant)
            key = next(own, next(reversed(self._records)))
            parked = self._take(key)
            assert parked is not None
            if self._store is None:
                self._add_closed(key, parked[0], SessionEvicted)
                continue
            self._parking[key] = parked
            park = self._park(self._store, key, parked, self._tasks.get(key))
            task = self._tasks[key] = asyncio.get_running_loop().create_task(park)
            task.add_done_callback(partial(self._parked, key))

    def _parked(self, key: Key, task: asyncio.Task[None]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]

    async def _park(
        self, store: Store, key: Key, parked: tuple[Record, float], before: asyncio.Task[None] | None
    ) -> None:
        """Move a record to the store. If the session is used before that is done, remove the record again.

        before: the same task for an earlier record of the session, which must finish first.
        """
        if before is not None:
            await asyncio.wait([before])
        if self._parking.get(key) is not parked:
            return
        record, token = parked[0], self._tokens.next()
        commit = Commit(key, b"", token, record.packed(), begins=True)
        (error,) = await store.commit([commit])
        if self._parking.get(key) is not parked:
            await self._remove(store, key, token)
            return
        del self._parking[key]
        if error is not None:
            _log.warning("session evicted", model=key[0], session=shown(key[1]), reason=error.message)
            self._add_closed(key, record, SessionEvicted)

    async def _remove(self, store: Store, key: Key, token: bytes) -> None:
        """Remove the record of a session that was used again. Retry until the store answers."""
        while True:
            try:
                await store.take(key, token)
            except StoreUnavailable as error:
                if self._finishing:
                    return
                await asyncio.sleep(error.retry_after)
            else:
                return

    def _add_closed(self, key: Key, record: Record, cause: type[SessionGone]) -> None:
        name, session_id = key
        if (model := self._versions.successor(name, record.origin.model)) is not None:
            if cause is not SessionClosed:
                model.scheduler.counters.count_gone(cause)
            model.scheduler.sessions.add_closed(session_id, cause, self._clock.now(), record.origin.opened_with)

    # ── from one process to the next ─────────────────────────────────────────────────────────────

    def save(self, file: StateFile) -> bool:
        """Write all memory sessions to a file after their models have stopped. False if the sessions are lost."""
        resident = [
            (model, session)
            for model in self._versions
            for session in model.scheduler.sessions
            if session.durable is None
        ]
        count = len(self._records) + len(resident)
        try:
            file.write(self._all_records(resident))
        except Exception as error:  # noqa: BLE001 lost sessions must be reported, whatever the reason
            _log.critical("sessions lost", path=str(file.path), sessions=count, reason=str(error))
            return False
        _log.info("sessions written", path=str(file.path), sessions=count)
        return True

    def _all_records(self, resident: list[tuple[ServedModel, Session]]) -> Iterator[tuple[Key, Record, float]]:
        now = self._clock.now()
        for key, (record, used) in self._records.items():
            yield key, record, now - used
        for model, session in resident:
            model.scheduler.sessions.detach_from_cohort(session)
            yield (model.name, session.id), model.record(session), now - session.last_used

    def load(self, file: StateFile) -> None:
        """Load the sessions of a file. The file stays."""
        now = self._clock.now()
        unserved = 0
        sessions = file.read()
        for key, record, idle in sessions:
            self._put(key, record, now - idle)
            unserved += self._versions.with_digest(key[0], record.origin.model) is None
        if sessions:
            _log.info("sessions read", path=str(file.path), sessions=len(sessions))
        if unserved:
            _log.warning("sessions of models that are not served here; they are kept", sessions=unserved)

    async def finish(self) -> None:
        self._finishing = True
        while self._tasks:
            await asyncio.wait(self._tasks.values())


def _size(record: Record) -> int:
    return _RECORD_BYTES + len(record.row) + sum(len(kept.outputs) for kept in record.kept)
