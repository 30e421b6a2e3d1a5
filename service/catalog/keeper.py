"""Durable sessions: brings them in from the store, so that they are served here as if they had always been here.

A request for a session that is not here, or whose copy here may be stale, waits for a lookup in the store and is then
handled again. Requests for one session wait in the order of their arrival. While such a request is handled, its session
is verified (`is_verified`): the copy here, or the absence of one, is what the store has.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import structlog

from unroll.service.catalog.model import ServedModel, home
from unroll.service.core.errors import SessionContended, SessionExists, SnapshotInvalid, UnrollError
from unroll.service.scheduler.session import Session
from unroll.service.state.snapshot import Snapshot
from unroll.service.store.interface import Commit, Key, Store, Tokens
from unroll.service.store.record import Gone, Record, pack_last

T = TypeVar("T")

_log = structlog.get_logger(__name__)

#: Called with None, or with why the session could not be looked up.
Then = Callable[[UnrollError | None], None]

#: How often a session is taken over from another process that wants it too, before that is given up.
_ATTEMPTS = 5


class Keeper:
    """models(name): the versions of a model, newest first, each on every device, retired ones included. living(name,
    session_id): which of them has the session."""

    def __init__(
        self,
        store: Store,
        models: Callable[[str], list[ServedModel]],
        living: Callable[[str, str], tuple[ServedModel, Session] | None],
    ) -> None:
        self.store = store
        self._models = models
        self._living = living
        self._tokens = Tokens()
        self._waiting: dict[Key, list[Then]] = {}
        self._verified: Key | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Keeper {len(self._waiting)} sessions being looked up>"

    def is_looked_up(self, name: str, session_id: str) -> bool:
        """Is it under way? Then whoever wants the session is to wait behind those that do."""
        return (name, session_id) in self._waiting

    def is_verified(self, name: str, session_id: str) -> bool:
        """Was the session looked up for the call that is running?"""
        return self._verified == (name, session_id)

    def fetch(self, name: str, session_id: str, then: Then) -> None:
        """Look the session up; `then` is called when what is known of it here is what the store knows."""
        key = name, session_id
        if (waiting := self._waiting.get(key)) is not None:
            waiting.append(then)
            return
        self._waiting[key] = [then]
        found = self._living(*key)
        if found is not None and found[1].durable is not None:
            found[1].durable.stale = True  # nothing is accepted before those who wait; what was accepted is done first
        task = asyncio.create_task(self._fetch(key), name=f"fetch {name}/{session_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def look_up(self, name: str, session_id: str, do: Callable[[], T]) -> T:
        """`fetch` for who can wait, and `do()` in the moment in which it is done; a moment later the session may have
        lost its row. Raises StoreUnavailable, or ModelChanged if no version here is the session's."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def then(error: UnrollError | None) -> None:
            if future.done():
                return
            try:
                if error is not None:
                    raise error
                future.set_result(do())
            except UnrollError as reason:
                future.set_exception(reason)

        self.fetch(name, session_id, then)
        return await future

    # ── what is done to a session besides steps ──────────────────────────────────────────────────

    async def create(self, served: ServedModel, session_id: str, position: int = 0, row: bytes = b"") -> Session:
        """A new durable session. Raises SessionExists, StoreUnavailable or CapacityExhausted."""
        served.scheduler.sessions.check_room()
        record = Record(served.origin(self.store.durability), position, row, token=self._tokens.next())
        key = served.name, session_id
        commit = Commit(key, b"", record.token, record.origin.to_bytes(), position, row, record.last, begins=True)
        (error,) = await self.store.commit([commit])
        if isinstance(error, SessionContended):
            found = await self.look_up(*key, lambda: self._living(*key))
            raise SessionExists(f"session {session_id!r} is open", position=found[1].position if found else None)
        if error is not None:
            raise error
        served.scheduler.counters.opened += 1
        return served.adopt(session_id, record)

    async def put(self, served: ServedModel, session: Session, snapshot: Snapshot) -> Session:
        """Put a durable session where the snapshot was taken, whatever it does meanwhile. Raises SessionError,
        StoreUnavailable, or SessionContended if others move it on all the time."""
        key, row = (served.name, session.id), snapshot.row.astype("<f4").tobytes()

        def find() -> Session:
            return served.scheduler.sessions.find_detached(session.id, served.loop.clock.now())

        for _ in range(_ATTEMPTS):
            assert session.durable is not None
            durable, last = session.durable, pack_last(session.depth, ())
            commit = Commit(key, durable.token, self._tokens.next(), durable.origin, snapshot.position, row, last)
            (error,) = await self.store.commit([commit])
            session = await self.look_up(*key, find)
            if not isinstance(error, SessionContended):
                break
        if error is not None:
            raise error
        return session

    async def close(self, served: ServedModel, session: Session) -> None:
        """End a durable session that is here. Raises StoreUnavailable, or the SessionError that says why it is not
        there to be ended."""
        position = await self.store.close((served.name, session.id))
        now = served.loop.clock.now()
        if position is None:
            raise await self.look_up(
                *(served.name, session.id), lambda: served.scheduler.sessions.closed.error(session.id, now)
            )
        if served.scheduler.sessions.get_detached(session.id, now) is session:
            served.scheduler.close(session, now)
        session.position = position

    async def stop(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _fetch(self, key: Key) -> None:
        error: UnrollError | None = None
        try:
            await self._bring_in(key)
        except UnrollError as reason:
            error = reason
        except Exception as reason:  # those who wait must not wait for ever
            _log.error("a session could not be brought in", model=key[0], session=key[1], exc_info=reason)
            error = SnapshotInvalid("what is stored of this session cannot be read; the server's log says why")
        waiting = self._waiting.pop(key)
        self._verified = key  # true until the last `then` returns, because nothing can suspend this loop
        try:
            for then in waiting:
                then(error)
        finally:
            self._verified = None

    async def _bring_in(self, key: Key) -> None:
        name, session_id = key
        if not self._models(name):
            return
        if (found := self._living(*key)) is not None:
            served, session = found
            if session.durable is None:
                return  # there is no other
            await _quiet(served, session)
        for _ in range(_ATTEMPTS):
            record = await self.store.load(key)
            if not isinstance(record, Record):
                self._is_gone(key, record)
                return
            if record.origin.durability != "memory" or await self.store.take(key, record.token):
                self._adopt(key, record)
                return
        raise SessionContended(f"session {session_id!r} is wanted by several replicas", 0.1)

    def _adopt(self, key: Key, record: Record) -> None:
        name, session_id = key
        found = self._living(*key)
        if found is not None and found[0].manifest.digest != record.origin.model:
            found[0].scheduler.sessions.drop(found[1])  # closed elsewhere, and opened anew on another version
            found = None
        model = home(self._models(name), session_id, record) if found is None else found[0]
        model.adopt(session_id, record)
        model.scheduler.counters.adopted += 1

    def _is_gone(self, key: Key, gone: Gone | None) -> None:
        """Whatever is here of it is of the past."""
        if (found := self._living(*key)) is not None:
            found[0].scheduler.sessions.drop(found[1])
        if gone is not None:
            models = self._models(key[0])
            (where, *_) = [m for m in models if m.manifest.digest == gone.origin.model] or models
            where.bury(key[1], gone)


async def _quiet(served: ServedModel, session: Session) -> None:
    """Returns when what was accepted for the session is done."""
    with suppress(UnrollError):  # it ended, or what it waited for failed: either way nothing is under way
        await served.loop.act(session, lambda session: None)
