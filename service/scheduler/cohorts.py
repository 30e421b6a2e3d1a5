"""Cohorts: sessions that repeatedly step together are handled as one record.

A cohort steps, rests, expires and is evicted like a single session. Code that needs one session detaches it, which
dissolves the cohort and leaves every session as it would be without.
"""

from collections.abc import Callable, Iterator

import numpy as np

from unroll.service.scheduler.recency import Recency
from unroll.service.scheduler.session import Cohort, Progress, Session


class Cohorts:
    """Forms, steps and dissolves cohorts.

    Args:
        recency: Order of last use of all sessions, where a cohort has a single entry.
    """

    def __init__(self, recency: Recency[Session | Cohort], on_dissolved: Callable[[Cohort], None]) -> None:
        self._recency = recency
        self._on_dissolved = on_dissolved

    def __iter__(self) -> Iterator[Cohort]:
        return (entry for entry in self._recency if isinstance(entry, Cohort))

    def form(self, sessions: list[Session], now: float) -> Cohort | None:
        """Form a cohort of sessions that became idle at `now`.

        Returns:
            None if the last chunk of a session is not in the step table.
        """
        if not all(session.applied is None for session in sessions):
            return None
        positions = np.array([session.position for session in sessions], np.uint64)
        cohort = Cohort(sessions, np.array([session.slot for session in sessions], np.intp), positions, now)
        self._recency.add(cohort)
        for session in sessions:
            self._recency.remove(session)
            session.cohort, session.progress = cohort, None
        return cohort

    def step(self, cohort: Cohort, now: float) -> None:
        """Complete the active step of all sessions; the cohort becomes idle."""
        cohort.positions = cohort.positions + np.uint64(1)
        cohort.active = None
        cohort.last_used = now
        self._recency.touch(cohort)

    def detach(self, session: Session) -> Progress:
        """Return the session's own progress, dissolving its cohort first."""
        if session.cohort is not None:
            self.dissolve(session.cohort)
        assert session.progress is not None
        return session.progress

    def dissolve(self, cohort: Cohort) -> None:
        steps = 0 if cohort.active is None else 1
        for session, position in zip(cohort.sessions, cohort.positions.tolist(), strict=True):
            session.cohort = None
            session.progress = Progress(position, position + steps, cohort.last_used, cohort.active)
        cohort.formed = False
        self._recency.replace(cohort, cohort.sessions)
        self._on_dissolved(cohort)

    def check_invariants(self) -> None:
        """Raises AssertionError if a cohort contradicts itself or its sessions."""
        for cohort in self:
            assert cohort.formed
            assert len(cohort.positions) == len(cohort.sessions)
            assert cohort.slots.tolist() == [session.slot for session in cohort.sessions]
            for session in cohort.sessions:
                assert session.cohort is cohort
                assert session.progress is None, "a session in a cohort has progress of its own"
                assert (session.applied, session.depth, session.source) == (None, 1, session.slot)
