"""Tombstones: remember for a while why a session ended."""

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass

from unroll.service.core.errors import (
    SessionClosed,
    SessionEvicted,
    SessionExpired,
    SessionGone,
    SessionUnknown,
    UnrollError,
)
from unroll.service.core.session_ids import shown, tenant_of
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.limits import SessionLimits
from unroll.service.scheduler.reply import payload_digest
from unroll.service.store.record import Kept

_REASONS = {
    SessionClosed: "was closed",
    SessionExpired: "was idle for too long and expired",
    SessionEvicted: "was evicted to make room for others",
}
#: How a session can end, by code.
CAUSES: dict[str, type[SessionGone]] = {cause.code: cause for cause in _REASONS}


@dataclass(frozen=True, slots=True)
class Tombstone:
    """Why and when a session ended. opened_with: digest of the request that opened it."""

    cause: type[SessionGone]
    since: float
    opened_with: bytes


class _Ends:
    """Ended sessions of one tenant, oldest first. nbytes: size of the kept replies."""

    __slots__ = ("closing_chunks", "nbytes", "tombstones")

    def __init__(self) -> None:
        self.tombstones: OrderedDict[str, Tombstone] = OrderedDict()
        self.closing_chunks: OrderedDict[str, Kept] = OrderedDict()
        self.nbytes = 0

    def forget(self, session_id: str) -> None:
        self.tombstones.pop(session_id, None)
        self.forget_closing_chunk(session_id)

    def forget_closing_chunk(self, session_id: str) -> None:
        if (last := self.closing_chunks.pop(session_id, None)) is not None:
            self.nbytes -= len(last.outputs)

    def keep_closing_chunk(self, session_id: str, last: Kept) -> None:
        self.forget_closing_chunk(session_id)
        self.closing_chunks[session_id] = last
        self.nbytes += len(last.outputs)


_NOTHING = _Ends()


def replaced(session_id: str) -> SessionClosed:
    """The error for a session after another was opened with its id."""
    return SessionClosed(f"session {shown(session_id)!r} was closed; its id now belongs to another session")


class ClosedSessions:
    """Tombstones, and the chunks that closed sessions, which answer retries.

    The limits are shared by all tenants. Beyond them, the tenant with the most entries loses its oldest, so one tenant
    cannot displace another's tombstones by closing many sessions.
    """

    def __init__(self, limits: SessionLimits) -> None:
        self._limits = limits
        self._of_tenants: OrderedDict[str, _Ends] = OrderedDict()  # in the order of expiry checks
        self._count = self._bytes = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._of(session_id).tombstones

    def add(
        self,
        session_id: str,
        cause: type[SessionGone],
        now: float,
        opened_with: bytes,
        last: Kept | None = None,
    ) -> None:
        """Add a session that ended at `now`. last: the chunk that closed it, if any."""
        self._put(session_id, Tombstone(cause, now, opened_with), last)
        self._of(session_id).tombstones.move_to_end(session_id)
        self._expire(tenant_of(session_id), now)
        if len(self._of_tenants) > 1:
            self._expire(next(iter(self._of_tenants)), now)  # and one other tenant's, in turn
        while self._count > self._limits.tombstones:
            most = max(self._of_tenants.values(), key=lambda ends: len(ends.tombstones))
            self.forget(next(iter(most.tombstones)))

    def forget(self, session_id: str) -> None:
        tenant = tenant_of(session_id)
        ends = self._of_tenants.get(tenant, _NOTHING)
        if session_id not in ends.tombstones:
            return
        self._count -= 1
        self._bytes -= ends.nbytes
        ends.forget(session_id)
        self._bytes += ends.nbytes
        if not ends.tombstones:
            del self._of_tenants[tenant]

    def merge(self, other: "ClosedSessions", living: Container[str]) -> None:
        """Add the entries of another table, except for ids that have one here or are in `living`."""
        for ends in other._of_tenants.values():
            for session_id, tombstone in ends.tombstones.items():
                if session_id not in living and session_id not in self:
                    self._put(session_id, tombstone, ends.closing_chunks.get(session_id))

    def get(self, session_id: str, now: float) -> Tombstone | None:
        tombstone = self._of(session_id).tombstones.get(session_id)
        return None if tombstone is None or self._has_expired(tombstone, now) else tombstone

    def error(self, session_id: str, now: float) -> UnrollError:
        """The error for a request to a session that is not open."""
        tombstone = self.get(session_id, now)
        if tombstone is None:
            return SessionUnknown(f"no session {shown(session_id)!r}: it was never opened here, or its state is lost")
        return tombstone.cause(f"session {shown(session_id)!r} {_REASONS[tombstone.cause]}")

    def closing_chunk(self, session_id: str, position: int, inputs: Tensors, now: float) -> Kept | None:
        """The chunk that closed the session, if these inputs are a retry of it."""
        last = self._of(session_id).closing_chunks.get(session_id)
        if last is None or self.get(session_id, now) is None:
            return None
        return last if (position, payload_digest(inputs)) == (last.start, last.digest) else None

    def was_opened_with(self, session_id: str, digest: bytes, now: float) -> bool:
        """Whether a request with this payload digest opened the session, recently enough to expect duplicates."""
        tombstone = self.get(session_id, now)
        if tombstone is None or not tombstone.opened_with or now >= tombstone.since + self._limits.duplicates_life:
            return False
        return digest == tombstone.opened_with

    def knows_request(self, session_id: str, inputs: Tensors, now: float) -> bool:
        """Whether a request with these inputs opened or closed the session."""
        digest = payload_digest(inputs)
        if self.was_opened_with(session_id, digest, now):
            return True
        last = self._of(session_id).closing_chunks.get(session_id)
        return last is not None and last.digest == digest and self.get(session_id, now) is not None

    def _has_expired(self, tombstone: Tombstone, now: float) -> bool:
        return now >= tombstone.since + self._limits.tombstone_life

    def _of(self, session_id: str) -> _Ends:
        return self._of_tenants.get(tenant_of(session_id), _NOTHING)

    def _expire(self, tenant: str, now: float) -> None:
        """Forget a tenant's expired tombstones, and move the tenant to the end of the expiry order."""
        self._of_tenants.move_to_end(tenant)
        tombstones = self._of_tenants[tenant].tombstones
        while tombstones and self._has_expired(next(iter(tombstones.values())), now):
            self.forget(next(iter(tombstones)))

    def _put(self, session_id: str, tombstone: Tombstone, last: Kept | None) -> None:
        ends = self._of_tenants.setdefault(tenant_of(session_id), _Ends())
        self._count += session_id not in ends.tombstones
        ends.tombstones[session_id] = tombstone
        if last is None or not last.outputs:
            return
        before = ends.nbytes
        ends.keep_closing_chunk(session_id, last)
        self._bytes += ends.nbytes - before
        while self._bytes > self._limits.closing_reply_bytes:
            most = max(self._of_tenants.values(), key=lambda ends: ends.nbytes)
            before = most.nbytes
            most.forget_closing_chunk(next(iter(most.closing_chunks)))
            self._bytes += most.nbytes - before
