"""What became of sessions that are no longer here: for a while, the table can still say so."""

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
from unroll.service.core.session_ids import shown
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.limits import SessionLimits
from unroll.service.scheduler.reply import AppliedChunk, Reply, payload_digest

_REASONS = {
    SessionClosed: "was closed",
    SessionExpired: "was idle for too long and expired",
    SessionEvicted: "was evicted to make room for others",
}


@dataclass(frozen=True, slots=True)
class Tombstone:
    """Why and since when a session is gone. opened_with: the digest of the request that opened it."""

    cause: type[SessionGone]
    since: float
    opened_with: bytes


class ClosedSessions:
    """Tombstones, oldest first, and the chunks that closed sessions, so that their retries are answered."""

    def __init__(self, limits: SessionLimits) -> None:
        self._limits = limits
        self._tombstones: OrderedDict[str, Tombstone] = OrderedDict()
        self._closing_chunks: OrderedDict[str, AppliedChunk] = OrderedDict()
        self._bytes = 0  # of their replies

    def __len__(self) -> int:
        return len(self._tombstones)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._tombstones

    def add(
        self,
        session_id: str,
        cause: type[SessionGone],
        now: float,
        opened_with: bytes,
        last: AppliedChunk | None = None,
    ) -> None:
        """Remember a session that is gone since `now`. last: the chunk that closed it, if one did."""
        self._put(session_id, Tombstone(cause, now, opened_with), last)
        self._tombstones.move_to_end(session_id)
        while self._tombstones:
            oldest, tombstone = next(iter(self._tombstones.items()))
            if len(self._tombstones) <= self._limits.tombstones and not self._has_expired(tombstone, now):
                break
            self.forget(oldest)

    def forget(self, session_id: str) -> None:
        """Keep nothing of a session of that id."""
        self._tombstones.pop(session_id, None)
        self._forget_closing_chunk(session_id)

    def merge(self, other: "ClosedSessions", living: Container[str]) -> None:
        """Take over what another table remembers, except of ids that are known here or `living`."""
        for session_id, tombstone in other._tombstones.items():
            if session_id not in living and session_id not in self._tombstones:
                self._put(session_id, tombstone, other._closing_chunks.get(session_id))

    def get(self, session_id: str, now: float) -> Tombstone | None:
        tombstone = self._tombstones.get(session_id)
        return None if tombstone is None or self._has_expired(tombstone, now) else tombstone

    def error(self, session_id: str, now: float) -> UnrollError:
        """The error that says what became of a session that is not here."""
        tombstone = self.get(session_id, now)
        if tombstone is None:
            return SessionUnknown(f"no session {shown(session_id)!r}: it was never opened here, or its state is lost")
        return tombstone.cause(f"session {shown(session_id)!r} {_REASONS[tombstone.cause]}")

    def reply_to(self, session_id: str, position: int, inputs: Tensors, now: float) -> Reply | None:
        """The reply to the chunk that closed the session, if this is that chunk again."""
        last = self._closing_chunks.get(session_id)
        if last is None or self.get(session_id, now) is None:
            return None
        return last.reply if (position, payload_digest(inputs)) == (last.start, last.digest) else None

    def was_opened_with(self, session_id: str, digest: bytes, now: float) -> bool:
        """Did the request of this payload digest open the session, and may its duplicates still arrive?"""
        tombstone = self.get(session_id, now)
        if tombstone is None or not tombstone.opened_with or now >= tombstone.since + self._limits.duplicates_life:
            return False
        return digest == tombstone.opened_with

    def knows_request(self, session_id: str, inputs: Tensors, now: float) -> bool:
        """Did a request of these inputs open or close the session?"""
        digest = payload_digest(inputs)
        if self.was_opened_with(session_id, digest, now):
            return True
        last = self._closing_chunks.get(session_id)
        return last is not None and last.digest == digest and self.get(session_id, now) is not None

    def _has_expired(self, tombstone: Tombstone, now: float) -> bool:
        return now >= tombstone.since + self._limits.tombstone_life

    def _put(self, session_id: str, tombstone: Tombstone, last: AppliedChunk | None) -> None:
        self._tombstones[session_id] = tombstone
        if last is None or last.reply is None:
            return
        self._forget_closing_chunk(session_id)
        self._closing_chunks[session_id] = last
        self._bytes += last.nbytes
        while self._bytes > self._limits.closing_reply_bytes:
            self._forget_closing_chunk(next(iter(self._closing_chunks)))

    def _forget_closing_chunk(self, session_id: str) -> None:
        if (last := self._closing_chunks.pop(session_id, None)) is not None:
            self._bytes -= last.nbytes
