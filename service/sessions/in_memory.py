"""Operations on sessions other than steps, for a server without a store."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from unroll.service.access.keys import Quota
from unroll.service.core.errors import ModelChanged, QuotaExceeded, UnrollError
from unroll.service.core.session_ids import NewId, shown, tenant_of
from unroll.service.engine.engine import Tensors
from unroll.service.models.served_model import ServedModel
from unroll.service.scheduler.closed_sessions import replaced
from unroll.service.scheduler.session import Session
from unroll.service.sessions.directory import SessionDirectory
from unroll.service.state.slots import INITIAL
from unroll.service.state.snapshot import Snapshot
from unroll.service.store.record import Origin, Record
from unroll.service.telemetry.metrics import StoreFigures

T = TypeVar("T")

_HOUSEKEEPING_SECONDS = 5.0

#: Called with None, or with the reason why the session could not be verified.
OnVerified = Callable[[UnrollError | None], None]


class MemorySessions:
    """Sessions that only this process has. Verification never suspends, because no other process has a newer state."""

    #: Whether verification may suspend for a store lookup.
    has_store = False
    #: The durabilities that the server supports itself.
    durabilities: tuple[str, ...] = ("memory",)
    #: For metrics; None without a store.
    store_figures: StoreFigures | None = None

    def __init__(self, directory: SessionDirectory, quota_of: Callable[[str], Quota | None]) -> None:
        self.directory = directory
        self._quota_of = quota_of
        self._opening: Counter[str] = Counter()  # sessions on their way to the store, of each tenant

    async def start(self) -> None: ...

    async def run(self) -> None:
        """Periodically remove expired spilled sessions, until cancelled."""
        while True:
            await asyncio.sleep(_HOUSEKEEPING_SECONDS)
            self.directory.spilled.expire()

    async def finish(self) -> None:
        """Wait for transfers to and from the store; the models must have stopped."""
        await self.directory.spilled.finish()

    async def stop(self) -> None: ...

    # ── verification ─────────────────────────────────────────────────────────────────────────────

    def is_verified(self, name: str, session_id: str) -> bool:
        """Whether the running call may rely on the local copy of the session, or on its absence."""
        return True

    def require_verified(self, name: str, session_id: str) -> None:
        """Raises NeedsStoreLookup unless the session is verified."""

    def verify(self, name: str, session_id: str, then: OnVerified) -> None:
        """Call `then` while the session is verified, or unverified if an earlier call's lookup was already sent."""
        then(None)

    async def verified(self, name: str, session_id: str | None, call: Callable[[], T]) -> T:
        """Run `call` while the session is verified. Afterwards, the session may lose its row to another.

        Raises:
            StoreUnavailable: The session could not be looked up.
            ModelChanged, VersionUnavailable: `call` needs the session's version, which is not served here.
        """
        return call()

    def owner(self, name: str, version: str | None, session_id: str) -> tuple[ServedModel, Session | None]:
        """See `SessionDirectory.owner`. Raises NeedsStoreLookup if only the store knows."""
        return self.directory.owner(name, version, session_id)

    # ── operations ───────────────────────────────────────────────────────────────────────────────

    async def find(self, name: str, version: str | None, session_id: str) -> tuple[ServedModel, Session]:
        return await self.verified(name, session_id, partial(self.directory.find, name, version, session_id))

    async def create(self, served: ServedModel, new: NewId, start: Snapshot | None, durability: str) -> Session:
        """Open a session.

        Args:
            start: The initial state; None for the model's own.
            durability: One of `durabilities`.

        Raises:
            SessionExists: A session with this id is open.
            CapacityExhausted: There is no free row.
            QuotaExceeded: See `refuse_another`.
            StoreUnavailable: The store could not be reached.
        """

        def open_here() -> Session:
            self.directory.check_free(served.name, new.id)
            self.refuse_another(tenant_of(new.id))
            return served.open(new.id, start)

        return await self.verified(served.name, new.requested, open_here)

    def refuse_another(self, tenant: str) -> None:
        """Raises QuotaExceeded if the tenant has reached its limit of sessions. Open the session in the same turn."""
        quota = self._quota_of(tenant) if tenant else None
        if quota is None or quota.sessions is None:
            return
        tables = [model.scheduler.sessions.of_tenants for model in self.directory.versions]
        count = sum(table[tenant] for table in (*tables, self.directory.spilled.of_tenants, self._opening))
        if count >= quota.sessions:
            raise QuotaExceeded(f"tenant {tenant!r} has reached its limit of sessions, {quota.sessions}: close some")

    async def fork(self, name: str, version: str | None, session_id: str, new: NewId) -> tuple[ServedModel, Session]:
        """Open a second session that continues from the state after the work accepted so far."""
        return await self._act(name, version, session_id, lambda served, session: self._fork(served, session, new))

    async def save(self, name: str, version: str | None, session_id: str) -> Snapshot:
        """The state after the work accepted so far."""
        return (await self._act(name, version, session_id, self._read))[1]

    async def copy(
        self, name: str, version: str | None, session_id: str, check: Callable[[Session], None]
    ) -> tuple[ServedModel, Snapshot, Tensors | None]:
        """The state after the work accepted so far, and the outputs of the last chunk, if they were kept.

        check: Raises if the session is not the one that the client meant.
        """

        def begin(served: ServedModel, session: Session) -> Awaitable[tuple[Snapshot, Tensors | None]]:
            check(session)

            def read(session: Session) -> tuple[Snapshot, Tensors | None]:
                return served.snapshot(session), served.scheduler.replay.last_outputs(session)

            return served.loop.act(session, read)

        served, (snapshot, outputs) = await self._act(name, version, session_id, begin)
        return served, snapshot, outputs

    async def restore(
        self, name: str, version: str | None, session_id: str, content: bytes
    ) -> tuple[ServedModel, Session]:
        """Return a session to the state of a snapshot, after the work accepted so far."""

        def begin(served: ServedModel, session: Session) -> Awaitable[Session]:
            return self._restore(served, session, served.read_snapshot(content))

        return await self._act(name, version, session_id, begin)

    async def _act(
        self, name: str, version: str | None, session_id: str, begin: Callable[[ServedModel, Session], Awaitable[T]]
    ) -> tuple[ServedModel, T]:
        """Start an operation while the session is verified. Returns the session's version, and the result."""

        def find_and_begin() -> tuple[ServedModel, Awaitable[T]]:
            served, session = self.directory.find(name, version, session_id)
            return served, begin(served, session)

        served, acting = await self.verified(name, session_id, find_and_begin)
        return served, await acting

    async def close(
        self, name: str, version: str | None, session_id: str, origin: Origin | None = None
    ) -> tuple[tuple[ServedModel, Session] | Record, int]:
        """Close a session, which needs no model. Returns it and its final position.

        If its version is not here, the record is returned in its place. origin: only the session with this origin, not
        another that was opened with its id since; None: any.
        """

        def close_here() -> tuple[tuple[ServedModel, Session] | Record, int]:
            if (stranded := self._close_stranded(name, version, session_id, origin)) is not None:
                return stranded, stranded.position
            served, session = self.directory.find(name, version, session_id)
            if origin not in (None, session.origin):
                raise replaced(session_id)
            if session.durable is None:  # a durable session is closed in the store first
                served.scheduler.close(session, served.loop.clock.now())
            return (served, session), session.position

        return await self.verified(name, session_id, close_here)

    def _close_stranded(self, name: str, version: str | None, session_id: str, origin: Origin | None) -> Record | None:
        """Close a session of a missing version. If the record has a token, the caller closes it in the store."""
        stranded = self.directory.find_stranded(name, session_id)
        others = [model.version for model in self.directory.versions.of(name)]
        if stranded is None or not others:
            return None
        if origin not in (None, stranded.origin):
            raise replaced(session_id)
        if version in others:
            raise ModelChanged(f"session {shown(session_id)!r} runs on another version of {name!r} than {version}")
        self.directory.spilled.close_stranded(name, session_id)
        return stranded

    def _fork(self, served: ServedModel, session: Session, new: NewId) -> Awaitable[Session]:
        def copy(session: Session) -> Session:
            self.directory.check_free(served.name, new.id)
            self.refuse_another(tenant_of(new.id))
            forked = served.scheduler.open(new.id, served.loop.clock.now(), position=session.position)
            if session.source != INITIAL:
                served.engine.copy(session.source, forked.slot)
                forked.source = forked.slot
            return forked

        return served.loop.act(session, copy)

    def _read(self, served: ServedModel, session: Session) -> Awaitable[Snapshot]:
        return served.loop.act(session, served.snapshot)

    def _restore(self, served: ServedModel, session: Session, snapshot: Snapshot) -> Awaitable[Session]:
        def write(session: Session) -> Session:
            served.write_snapshot(session, snapshot)
            served.scheduler.replay.forget(session)  # its chunks led to another state
            return session

        return served.loop.act(session, write)
