"""Per-session queues: a session's work runs one item at a time, in order of arrival."""

from collections import deque

from unroll.service.core.errors import PositionGap
from unroll.service.scheduler.chunk import Action, Chunk, Group
from unroll.service.scheduler.lanes import Lanes
from unroll.service.scheduler.session import Progress, Session, Work
from unroll.service.scheduler.session_table import SessionTable


class SessionQueues:
    """Decides which work of a session is active, that is ready or running. The rest is pending.

    actions: ready actions; ready chunks and groups wait in the lanes.
    """

    def __init__(self, lanes: Lanes, sessions: SessionTable) -> None:
        self._lanes = lanes
        self._sessions = sessions
        self.actions: deque[Action] = deque()

    def add(self, progress: Progress, work: Chunk | Action, now: float) -> None:
        active = progress.active
        if active is None:
            progress.active = work
            self._make_ready(work, now)
            return
        if isinstance(active, Group):
            active.followed = True
        if progress.pending is None:
            progress.pending = [work]
        else:
            progress.pending.append(work)

    def advance(self, session: Session, now: float) -> None:
        """After the active work is done, activate the next that is still wanted, or make the session idle."""
        progress = session.progress
        if progress is not None and progress.pending is not None:
            while progress.pending:
                work = progress.pending.pop(0)
                if work.outcome is None:
                    progress.active = work
                    self._make_ready(work, now)
                    return
            progress.pending = None
        self._sessions.rest((session,), now)

    def renumber(self, session: Session) -> list[tuple[Chunk, PositionGap]]:
        """Assign new positions to the accepted chunks, because an earlier one was not applied.

        Returns:
            The chunks that are pinned to their old position, with the error to fail each with.
        """
        misplaced = []
        progress = session.own_progress
        expected = progress.position
        for work in progress.queue():
            if isinstance(work, Chunk):
                if work.pinned and work.start != expected:
                    gap = f"the session is at {expected}, the chunk begins at {work.start}"
                    misplaced.append((work, PositionGap(gap, expected=expected)))
                    continue
                work.start = expected
            expected += work.length
        progress.expected = expected
        return misplaced

    def take_actions(self) -> list[Action]:
        """Remove and return the ready actions that are still wanted."""
        actions = [action for action in self.actions if action.outcome is None]
        self.actions.clear()
        return actions

    def _make_ready(self, work: Work, now: float) -> None:
        if isinstance(work, Action):
            self.actions.append(work)
        else:
            assert isinstance(work, Chunk | Group)
            self._lanes.put(work, now)
