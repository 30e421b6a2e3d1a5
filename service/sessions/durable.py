"""Durable sessions: loads them from the store on demand, and writes all changes other than steps to the store.

A request for a session without a local copy, or with one that may be stale, waits for a store lookup and is then
handled again. Lookups from one turn of the event loop share an exchange. Requests for one session keep their order.
While such a request is handled, its session is verified (`is_verified`): the local copy, or its absence, matches the
store. A request that arrives after the lookup was sent is handled too, but unverified: another replica may have updated
the session after the store answered.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from unroll.service.access.keys import Quota
from unroll.service.core.errors import (
    CapacityExhausted,
    NeedsStoreLookup,
    SessionContended,
    SessionExists,
    SnapshotInvalid,
    UnrollError,
)
from unroll.service.core.session_ids import NewId, shown, tenant_of
from unroll.service.models.served_model import ServedModel
from unroll.service.scheduler.session import Session
from unroll.service.sessions.attempts import ATTEMPTS, contended
from unroll.service.sessions.directory import SessionDirectory
from unroll.service.sessions.in_memory import MemorySessions, OnVerified
from unroll.service.state.snapshot import Snapshot
from unroll.service.store.interface import Commit, Key, Store, Tokens
from unroll.service.store.record import MEMORY, STORED, Gone, Origin, Record, pack, pack_last

T = TypeVar("T")

_log = structlog.get_logger(__name__)

#: Result of a lookup: the store's answer, or why there is none.
Found = Record | Gone | UnrollError | None

#: Maximum number of records in doubt.
_MOST_IN_DOUBT = 1000


class DurableSessions(MemorySessions):
    """Sessions of a server with a store, including its memory sessions. The store may have any session of any model."""

    has_store = True

    def __init__(self, directory: SessionDirectory, store: Store, quota_of: Callable[[str], Quota | None]) -> None:
        super().__init__(directory, quota_of)
        self.durabilities = (MEMORY, STORED)
        self.store_figures = store.figures
        self._store = store
        self._tokens = Tokens()
        self._waiting: dict[Key, list[OnVerified]] = {}
        self._looked_up: list[Key] = []  # keys whose lookups will be sent together
        self._verified: Key | None = None
        #: Records whose `take` got no answer from the store, with the attempt's token.
        self._in_doubt: dict[Key, tuple[Record, bytes]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._store.start()

    async def finish(self) -> None:
        await super().finish()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def stop(self) -> None:
        await self._store.stop()

    # ── lookups ──────────────────────────────────────────────────────────────────────────────────

    def is_verified(self, name: str, session_id: str) -> bool:
        return self._verified == (name, session_id)

    def require_verified(self, name: str, session_id: str) -> None:
        if not self.is_verified(name, session_id):
            raise NeedsStoreLookup(session_id)

    def owner(self, name: str, version: str | None, session_id: str) -> tuple[ServedModel, Session | None]:
        living = self.directory.living(name, session_id)
        if (living is None or self._waiting) and not self.is_verified(name, session_id):
            absent = living is None and self.directory.versions.of(name)
            if absent or (name, session_id) in self._waiting:  # waiting calls come first
                raise NeedsStoreLookup(session_id)
        return self.directory.owner_of(living, name, version, session_id)

    def verify(self, name: str, session_id: str, then: OnVerified) -> None:
        key = name, session_id
        if (waiting := self._waiting.get(key)) is not None:
            waiting.append(then)
            return
        self._waiting[key] = [then]
        found = self.directory.living(*key)
        durable = None if found is None else found[1].durable
        if not self.directory.versions.of(name) or (found is not None and durable is None):  # nothing to look up
            asyncio.get_running_loop().call_soon(self._call_waiting, key, None)
        elif found is None or durable is None:
            self._look_up(key)
        else:
            durable.stale = True  # new work waits behind these calls; accepted work finishes first
            if found[1].active is None:
                self._look_up(key)
            else:
                self._run(self._look_up_busy(key, *found))

    async def verified(self, name: str, session_id: str | None, call: Callable[[], T]) -> T:
        if session_id is None:
            return call()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def then(error: UnrollError | None) -> None:
            if future.done():
                return
            if error is None and not self.is_verified(name, session_id):
                self.verify(name, session_id, then)
                return
            try:
                if error is not None:
                    raise error
                future.set_result(call())
            except Exception as reason:  # noqa: BLE001 raised in the caller
                future.set_exception(reason)

        self.verify(name, session_id, then)
        return await future

    def _look_up(self, key: Key) -> None:
        """Look up a session without accepted work. Lookups from one turn of the event loop are sent together."""
        if key in self._in_doubt:
            self._run(self._bring_in(key, *self._in_doubt[key]))
            return
        self._looked_up.append(key)
        if len(self._looked_up) == 1:
            asyncio.get_running_loop().call_soon(self._send_lookups)

    def _send_lookups(self) -> None:
        keys, self._looked_up = self._looked_up, []
        self._run(self._look_up_all(keys))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="look up")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_up_busy(self, key: Key, served: ServedModel, session: Session) -> None:
        with suppress(UnrollError):  # the session ended or its work failed; either way, no work is left
            await served.loop.act(session, lambda session: None)
        self._look_up(key)

    async def _look_up_all(self, keys: list[Key]) -> None:
        found: Sequence[Found]
        counts = [len(self._waiting[key]) for key in keys]
        try:
            found = await self._store.load_all(keys)
        except Exception as reason:  # noqa: BLE001 the waiting requests must get an answer
            found = [_unreadable(key, reason) for key in keys]
        for each in zip(keys, found, counts, strict=True):
            # Separate calls, so that an error in one does not affect the rest.
            asyncio.get_running_loop().call_soon(self._settle, *each)

    def _settle(self, key: Key, found: Found, count: int) -> None:
        """Update the local copy from a lookup, and call the waiting calls; `count` arrived before it was sent."""
        left: Found = None
        here = self.directory.living(*key)
        if here is not None and here[1].durable is not None and here[1].active is not None:  # opened here since
            here[1].durable.stale = True
            self._run(self._look_up_busy(key, *here))
            return
        try:
            if not isinstance(found, Record):
                left = found if isinstance(found, UnrollError) else self._drop(key, found)
            elif self.directory.versions.with_digest(key[0], found.origin.model) is None:
                self._drop(key, None)
                left = found
            elif found.origin.durability == MEMORY:
                self._run(self._bring_in(key, found, self._tokens.next()))
                return
            else:
                self._adopt(key, found)
        except Exception as reason:  # noqa: BLE001 the waiting requests must get an answer
            left = _unreadable(key, reason)
        self._call_waiting(key, left, count)

    async def _bring_in(self, key: Key, record: Record, attempt: bytes) -> None:
        """Take a memory session's record from the store. If the store does not answer, the next lookup tries again."""
        error = None
        try:
            self._in_doubt[key] = record, attempt
            if len(self._in_doubt) > _MOST_IN_DOUBT:
                del self._in_doubt[next(iter(self._in_doubt))]
            taken = await self._store.take(key, record.token, attempt)
            self._in_doubt.pop(key, None)
            if not taken:
                self._look_up(key)
                return
            self._adopt_taken(key, record)
        except Exception as reason:  # noqa: BLE001 the waiting requests must get an answer
            error = _unreadable(key, reason)
        self._call_waiting(key, error)

    def _call_waiting(self, key: Key, left: Found, count: int | None = None) -> None:
        """Call the waiting calls in order: the first `count` (None: all) verified, the rest not.

        left: what the store has for a session whose version is not served here, or why the lookup failed.
        """
        error = left if isinstance(left, UnrollError) else None
        waiting = self._waiting.pop(key)
        self._verified = key  # true until the last `then` returns, because nothing can suspend this loop
        self.directory.stranded = (*key, left) if isinstance(left, Record | Gone) else None
        try:
            for then in waiting[:count]:
                then(error)
        finally:
            self._verified = self.directory.stranded = None
        for then in waiting[len(waiting) if count is None else count :]:
            then(error)

    def _adopt_taken(self, key: Key, record: Record) -> None:
        try:
            self._adopt(key, record)
        except UnrollError:  # the store no longer has it
            self.directory.spilled.put(key, record)
            raise

    def _adopt(self, key: Key, record: Record) -> None:
        name, session_id = key
        found = self.directory.living(*key)
        if found is not None and found[0].manifest.digest != record.origin.model:
            found[0].scheduler.sessions.drop(found[1])  # closed elsewhere, and opened again on another version
            found = None
        what = f"session {shown(session_id)!r} runs on"
        model = self.directory.versions.home(name, record.origin.model, what) if found is None else found[0]
        model.adopt(session_id, record)
        model.scheduler.counters.adopted += 1

    def _drop(self, key: Key, gone: Gone | None) -> Gone | None:
        """Drop the local copy of a session that is not in the store, and add a tombstone if the store has one.

        Returns the tombstone if it contains a reply of a version that is not here.
        """
        name, session_id = key
        versions = self.directory.versions
        if (found := self.directory.living(*key)) is not None:
            found[0].scheduler.sessions.drop(found[1])
        if gone is None or (model := versions.successor(name, gone.origin.model)) is None:
            return None
        is_here = model.manifest.digest == gone.origin.model
        model.add_closed(session_id, gone if is_here else replace(gone, kept=()))
        return gone if gone.kept and not is_here else None

    # ── operations other than steps ──────────────────────────────────────────────────────────────

    async def create(self, served: ServedModel, new: NewId, start: Snapshot | None, durability: str) -> Session:
        if durability == MEMORY:
            return await super().create(served, new, start, durability)
        key, tenant = (served.name, new.id), tenant_of(new.id)
        await self.verified(served.name, new.requested, lambda: self.directory.check_free(*key))
        self.refuse_another(tenant)
        served.scheduler.sessions.check_room()
        position, row = (start.position, _bytes(start)) if start is not None else (0, b"")
        record = Record(served.origin(durability), position, row, token=self._tokens.next())
        commit = Commit(key, b"", record.token, record.packed(), begins=True)
        self._opening[tenant] += 1
        try:
            (error,) = await self._store.commit([commit])
        finally:
            self._opening -= Counter((tenant,))
        if isinstance(error, SessionContended):
            await self.verified(*key, lambda: self.directory.check_free(*key))  # raises SessionExists with the position
            raise SessionExists(f"session {shown(new.id)!r} is open")
        if error is not None:
            raise error
        served.scheduler.counters.opened += 1
        found = self.directory.living(*key)
        if found is None:
            try:
                return served.adopt(new.id, record)
            except CapacityExhausted:  # there was a free row before the commit
                await self._store.take(key, record.token)
                raise
        if found[1].origin != record.origin:  # closed, and opened again since
            raise contended(new.id)
        return found[1]  # a lookup was faster

    async def close(
        self, name: str, version: str | None, session_id: str, origin: Origin | None = None
    ) -> tuple[tuple[ServedModel, Session] | Record, int]:
        closed, position = await super().close(name, version, session_id, origin)
        if isinstance(closed, Record):
            if closed.token:
                position = await self._close_stored(name, session_id, closed.origin.to_bytes())
            return closed, position
        served, session = closed
        if session.durable is not None:
            position = await self._close_stored(name, session_id, session.durable.origin)
            now = served.loop.clock.now()
            if served.scheduler.sessions.get_detached(session_id, now) is session:
                served.scheduler.close(session, now)
        return closed, position

    async def _close_stored(self, name: str, session_id: str, origin: bytes) -> int:
        """Close the session in the store. Returns its final position, which another replica may have reached."""
        position = await self._store.close((name, session_id), origin)
        if position is None:
            await self.verified(name, session_id, lambda: self.directory.find(name, None, session_id))
            raise contended(session_id)  # another session has been opened with this id
        return position

    def _fork(self, served: ServedModel, session: Session, new: NewId) -> Awaitable[Session]:
        if session.durable is None:
            return super()._fork(served, session, new)
        return self._create_from(served, new, self._read(served, session))

    async def _create_from(self, served: ServedModel, new: NewId, reading: Awaitable[Snapshot]) -> Session:
        return await self.create(served, new, await reading, STORED)

    def _restore(self, served: ServedModel, session: Session, snapshot: Snapshot) -> Awaitable[Session]:
        if session.durable is None:
            return super()._restore(served, session, snapshot)
        return self._restore_stored(served, session, snapshot)

    async def _restore_stored(self, served: ServedModel, session: Session, snapshot: Snapshot) -> Session:
        key, row = (served.name, session.id), _bytes(snapshot)

        def find() -> Session:
            return served.scheduler.sessions.find_detached(session.id, served.loop.clock.now())

        for _ in range(ATTEMPTS):
            assert session.durable is not None
            durable, last = session.durable, pack_last(session.depth, ())
            content = pack(durable.origin, snapshot.position, row, last)
            commit = Commit(key, durable.token, self._tokens.next(), content)
            (error,) = await self._store.commit([commit])
            session = await self.verified(*key, find)
            if not isinstance(error, SessionContended):
                break
        if error is not None:
            raise error
        return session


def _unreadable(key: Key, reason: Exception) -> UnrollError:
    """Why a lookup failed; logged if that is not known yet."""
    if isinstance(reason, UnrollError):
        return reason
    _log.error("session not loaded from the store", model=key[0], session=shown(key[1]), exc_info=reason)
    return SnapshotInvalid("the stored session cannot be read; the server's log has the reason")


def _bytes(snapshot: Snapshot) -> bytes:
    return snapshot.row.astype("<f4").tobytes()
