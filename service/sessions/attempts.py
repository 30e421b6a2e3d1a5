"""Repeats a call after a store lookup of its session, or after another replica updated the session."""

from collections.abc import Callable

from unroll.service.core.errors import NeedsStoreLookup, SessionContended, UnrollError
from unroll.service.core.session_ids import shown
from unroll.service.sessions.in_memory import MemorySessions

#: Maximum number of restarts, and of store lookups, per call before it fails with `session_contended`.
ATTEMPTS = 8


class Attempts:
    """Calls `begin` until its session needs no further lookup. Calls for one session keep their order.

    Args:
        begin: Starts the work; may raise NeedsStoreLookup.
        fail: Called with the error if the lookup fails.
    """

    __slots__ = ("_begin", "_fail", "_left", "_lookups", "_name", "_sessions")

    def __init__(
        self, sessions: MemorySessions, name: str, begin: Callable[[], None], fail: Callable[[UnrollError], None]
    ) -> None:
        self._sessions = sessions
        self._name = name
        self._begin = begin
        self._fail = fail
        self._left = self._lookups = ATTEMPTS

    def run(self) -> None:
        try:
            self._begin()
        except NeedsStoreLookup as needed:
            self.look_up(needed.session_id)

    def again(self) -> bool:
        """Start again after a commit was refused; False after too many attempts.

        Usually the refusal brought the record. Otherwise the copy is stale, and `begin` raises NeedsStoreLookup.
        """
        if not self._left:
            return False
        self._left -= 1
        self.run()
        return True

    def look_up(self, session_id: str) -> None:
        """Begin after a lookup of the session, and after the calls that already wait for one."""
        if self._lookups:
            self._lookups -= 1
            self._sessions.verify(self._name, session_id, self._verified)
        else:
            self._fail(contended(session_id))

    def _verified(self, error: UnrollError | None) -> None:
        if error is None:
            self.run()
        else:
            self._fail(error)


def contended(session_id: str) -> SessionContended:
    session = f"session {shown(session_id)!r}"
    return SessionContended(f"{session} is being updated concurrently by other replicas; retry", 0.1)
