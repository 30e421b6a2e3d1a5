"""The session table: open sessions and their arena rows.

The life of a session:

- An OPEN session is idle or has work: one item is active, the rest is pending.
- Only idle sessions expire or are evicted, so neither loses accepted work.
- A session can be closed in any state. Waiting work fails with `session_closed`. Running work completes first; until
  then the session is LEAVING.
- A session that is GONE leaves a tombstone, see `closed_sessions.py`.
- A durable session here is a copy. When it expires or is evicted, the copy is dropped without a tombstone.
- Idle sessions can form a cohort, see `cohorts.py`. Looking up a session for work detaches it from its cohort.

A transition that is not in the table raises and changes nothing.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from unroll.service.core.errors import (
    CapacityExhausted,
    SessionClosed,
    SessionEvicted,
    SessionExists,
    SessionExpired,
    SessionGone,
    UnrollError,
)
from unroll.service.core.session_ids import shown, tenant_of
from unroll.service.scheduler.closed_sessions import ClosedSessions, replaced
from unroll.service.scheduler.cohorts import Cohorts
from unroll.service.scheduler.limits import SessionLimits
from unroll.service.scheduler.recency import Recency
from unroll.service.scheduler.session import OPEN, Cohort, Durable, Life, Progress, Session
from unroll.service.state.slots import INITIAL, Slots
from unroll.service.store.record import Kept, Origin

#: How many sessions to examine for one that can give up its row.
_MOST_LOOKED_AT = 1000

TRANSITIONS = {
    (Life.OPEN, "end"): Life.GONE,
    (Life.OPEN, "leave"): Life.LEAVING,
    (Life.LEAVING, "rest"): Life.GONE,
}


class SessionTable:
    """The open sessions of a model on a device.

    Args:
        on_gone: Called with the cause for each session that expires or is evicted.
        on_dissolved: Called with each cohort that is dissolved.
        spill: Called with each memory session that is about to be evicted, and whether its tenant's other sessions may
            be discarded to make room for it. Returns true if it keeps the session elsewhere.
        on_end: Called with each session that ends.
    """

    def __init__(
        self,
        limits: SessionLimits,
        on_gone: Callable[[type[SessionGone]], None] = lambda cause: None,
        on_dissolved: Callable[[Cohort], None] = lambda cohort: None,
        spill: Callable[[Session, bool], bool] = lambda session, at_cost: False,
        on_end: Callable[[Session], None] = lambda session: None,
    ) -> None:
        self.limits = limits
        self.idle_timeout = math.inf if limits.idle_timeout is None else limits.idle_timeout
        self.slots = Slots(limits.capacity)
        self._on_gone = on_gone
        self._spill = spill
        self._on_end = on_end
        self._live: dict[str, Session] = {}
        self._recency: Recency[Session | Cohort] = Recency()  # open sessions and cohorts
        self._leaving: set[Session] = set()
        self.cohorts = Cohorts(self._recency, on_dissolved)
        self.closed = ClosedSessions(limits)
        self.of_tenants: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Session]:
        """Least recently used first. Cohorts stay intact, so detach a session before reading its position."""
        for entry in self._recency:
            yield from entry.sessions if isinstance(entry, Cohort) else (entry,)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._live

    def get(self, session_id: str) -> Session | None:
        """The open session as it is: possibly in a cohort, possibly past its idle timeout."""
        return self._live.get(session_id)

    def __repr__(self) -> str:
        return f"<SessionTable {len(self._live)} live, {len(self._leaving)} leaving, {len(self.closed)} tombstones>"

    def open(
        self, session_id: str, now: float, *, position: int = 0, origin: Origin | None = None, token: bytes = b""
    ) -> Session:
        """Open a session.

        Args:
            position: Steps that it has already consumed elsewhere.
            origin: For a session that has a record or will have one.
            token: Token of the last commit, if there was one.

        Raises:
            SessionExists: A session with this id is open.
            CapacityExhausted: Every row belongs to a session with work.
        """
        self.expire(now)
        if (living := self._live.get(session_id)) is not None:
            raise SessionExists(f"session {shown(session_id)!r} is open", position=self.cohorts.detach(living).position)
        slot = self.slots.take()
        if slot is None:
            self._evict_one(tenant_of(session_id), now)
            slot = self.slots.take()
            assert slot is not None
        session = Session(session_id, slot, INITIAL, Progress(position, position, now), origin=origin)
        if origin is not None and origin.durability != "memory":
            session.durable = Durable(origin.to_bytes(), token)
        self._live[session_id] = session
        self.of_tenants[tenant_of(session_id)] += 1
        self._recency.add(session)
        self.closed.forget(session_id)
        return session

    @property
    def everyone(self) -> list[Session]:
        return [*self._live.values(), *self._leaving]

    def check_room(self) -> None:
        """Raises CapacityExhausted if no session can be opened now."""
        if self.slots.taken == self.slots.count and all(entry.active is not None for entry in self._recency):
            raise CapacityExhausted(f"all sessions have work in progress; the capacity is {self.limits.capacity}")

    def find_detached(self, session_id: str, now: float) -> Session:
        """The open session with this id, detached from its cohort.

        Raises:
            SessionUnknown: It was never open here.
            SessionGone: The subclass says why it ended.
        """
        session = self.get_detached(session_id, now)
        if session is None:
            raise self.closed.error(session_id, now)
        return session

    def get_detached(self, session_id: str, now: float) -> Session | None:
        """The open session with this id, detached from its cohort; None if there is none."""
        session = self._live.get(session_id)
        if session is None:
            return None
        progress = session.progress or self.cohorts.detach(session)
        if now - progress.last_used >= self.idle_timeout and progress.active is None:
            self.expire(now)
            return None
        return session

    def require_open(self, session: Session, now: float) -> Progress:
        """Detach the session from its cohort, and return its progress.

        Raises:
            SessionUnknown, SessionGone: The session is no longer open.
        """
        progress = session.progress or self.cohorts.detach(session)
        if session.life is OPEN and (now - progress.last_used < self.idle_timeout or progress.active is not None):
            return progress
        self.expire(now)
        raise self.ended(session, now)

    def ended(self, session: Session, now: float) -> UnrollError:
        """The error for a request to a session that is no longer open."""
        return replaced(session.id) if session.id in self._live else self.closed.error(session.id, now)

    def detach_from_cohort(self, session: Session) -> Session:
        """Return the session with its own progress, dissolving its cohort if it is in one."""
        self.cohorts.detach(session)
        return session

    def add_closed(
        self,
        session_id: str,
        cause: type[SessionGone],
        now: float,
        opened_with: bytes,
        last: Kept | None = None,
    ) -> None:
        """Add a tombstone for a session that ended elsewhere, unless one with this id is open here."""
        if session_id not in self._live:
            self.closed.add(session_id, cause, now, opened_with, last)

    def merge_closed(self, other: "SessionTable") -> None:
        """Take over the tombstones of another table, which is being dropped."""
        self.closed.merge(other.closed, self._live)

    def advance(self, session: Session, event: str) -> None:
        """Apply a transition. Raises KeyError if the session's state does not permit it."""
        session.life = TRANSITIONS[session.life, event]
        if session.life is Life.GONE:
            self._on_end(session)
            if session in self._leaving:
                self._leaving.remove(session)
                self.slots.give_back(session.slot)

    def rest(self, sessions: Sequence[Session], now: float) -> None:
        """Make the sessions idle: their idle time begins, and they become the most recently used."""
        self._recency.touch(*[session for session in sessions if session.life is OPEN])
        for session in sessions:
            progress = session.progress
            assert progress is not None
            progress.active = None
            progress.last_used = now
            if session.life is not OPEN:
                self.advance(session, "rest")

    # ── the end of sessions ──────────────────────────────────────────────────────────────────────

    def close(self, session: Session, now: float, last: Kept | None = None, *, running: bool = False) -> None:
        """Close a session.

        Args:
            last: The chunk that closed it, if retries must be answered.
            running: The session has running work, which completes first.
        """
        self._take_out(session, "leave" if running else "end")
        self.closed.add(session.id, SessionClosed, now, session.opened_with, last)

    def expire(self, now: float) -> None:
        """Remove every session past its idle timeout."""
        while (oldest := self._recency.oldest) is not None:
            progress = oldest if isinstance(oldest, Cohort) else oldest.own_progress
            if now - progress.last_used < self.idle_timeout:
                return
            if progress.active is not None:  # it is not idle
                progress.last_used = now
                self._recency.touch(oldest)
            elif isinstance(oldest, Cohort):
                self.cohorts.dissolve(oldest)
            elif oldest.durable is not None:
                self.drop(oldest)
            else:
                self._lose(oldest, SessionExpired, now)

    def drop(self, session: Session) -> None:
        """Remove a session that is kept elsewhere, without a tombstone."""
        self._take_out(session, "end")

    def _evict_one(self, tenant: str, now: float) -> None:
        """Free the row of the least recently used idle session.

        Another tenant's session may lose its row, but not its state.
        """
        others_fit = True
        for entry in islice(self._recency, _MOST_LOOKED_AT):
            first = entry.sessions[0] if isinstance(entry, Cohort) else entry
            is_own = tenant_of(first.id) == tenant
            if entry.active is not None or not (is_own or others_fit or first.durable is not None):
                continue
            session = self.detach_from_cohort(first)
            if session.durable is not None or self._spill(session, is_own):
                self.drop(session)
                return
            if is_own:
                self._lose(session, SessionEvicted, now)
                return
            others_fit = False
        reason = " or belong to other tenants" if tenant else ""
        raise CapacityExhausted(f"all sessions have work in progress{reason}; the capacity is {self.limits.capacity}")

    def _lose(self, session: Session, cause: type[SessionGone], now: float) -> None:
        self._take_out(session, "end")
        self.closed.add(session.id, cause, now, session.opened_with)
        self._on_gone(cause)

    def _take_out(self, session: Session, event: str) -> None:
        self.advance(session, event)
        del self._live[session.id]
        tenant = tenant_of(session.id)
        self.of_tenants[tenant] -= 1
        if not self.of_tenants[tenant]:
            del self.of_tenants[tenant]
        self._recency.remove(session)
        if session.life is Life.LEAVING:
            self._leaving.add(session)
        else:
            self.slots.give_back(session.slot)

    def check_invariants(self) -> None:
        """Raises AssertionError if the table contradicts itself."""
        everyone = self.everyone
        assert len({session.slot for session in everyone}) == len(everyone), "two sessions share a row"
        assert self.slots.taken == len(everyone), "a row is lost"
        assert all(session.id == key for key, session in self._live.items())
        assert self.of_tenants == Counter(map(tenant_of, self._live))
        assert all(session.life is Life.LEAVING for session in self._leaving)
        assert sorted(session.id for session in self) == sorted(self._live), "a session has no place, or two"
        for entry in self._recency:
            for session in entry.sessions if isinstance(entry, Cohort) else [entry]:
                assert session.life is Life.OPEN, session
                assert session.id not in self.closed, session
            if isinstance(entry, Session):
                assert entry.cohort is None
                assert not entry.own_progress.pending or entry.active is not None, entry
                accepted = sum(work.length for work in entry.own_progress.queue())
                assert entry.expected == entry.position + accepted, entry
        self.cohorts.check_invariants()
