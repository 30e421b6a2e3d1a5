"""A scheduler with its engine and clients. Logs every reply."""

import numpy as np
from fold import FoldEngine, inputs, scheduler, submit

from unroll.service.scheduler.batch import Batch
from unroll.service.scheduler.chunk import Chunk, GroupReply
from unroll.service.scheduler.reply import Reply
from unroll.service.scheduler.scheduler import Scheduler
from unroll.service.scheduler.session import Cohort, Session

BAD = 99


class Served:
    """A scheduler and an engine. `cohorts`: whether sessions that step together form a cohort."""

    def __init__(self, *, cohorts: bool, capacity: int = 4, max_batch: int = 3) -> None:
        self.scheduler: Scheduler = scheduler(capacity=capacity, max_batch=max_batch)
        self.engine = FoldEngine(self.scheduler.rows)
        self.engine.failing = {BAD}
        self.batch = Batch()
        self.log: list[object] = []  # the replies
        self.chunks: list[Chunk] = []
        self.bound: dict[str, Session] = {}  # as a stream holds them: without a lookup, so possibly closed or expired
        self.as_cohorts = 0
        self._cohorts = cohorts
        self._lineups: dict[tuple[Session, ...], list[Cohort]] = {}

    def open(self, session_id: str, now: float) -> str:
        self.bound[session_id] = self.scheduler.open(session_id, now)
        return repr(self.bound[session_id])

    def frame(self, ids: list[str], positions: list[int | None], values: list[int], now: float) -> list[int]:
        """Submit one step per session; return the rejected rows."""
        sessions = [self.bound[i] for i in ids]
        rows = (np.array(values)[:, np.newaxis],)
        known = self._lineups.get(key := tuple(sessions), [])
        again, said = key in self._lineups, [position for position in positions if position is not None]
        if sum(len(cohort.sessions) for cohort in known) == len(ids) and len(said) in (0, len(ids)):
            at = np.array(said, np.uint64) if said else None
            if self.scheduler.groups.submit_cohorts(known, at, rows, now, now + 50, self.answered):
                self.as_cohorts += 1
                return []
        cohorts: list[Cohort] = []

        def then(reply: GroupReply) -> None:
            self.answered(reply)
            cohorts.extend([reply.cohort] if reply.cohort is not None else [])

        self._lineups[key] = cohorts
        return self.scheduler.groups.submit(
            sessions, positions, rows, now, now + 50, then, again=again and self._cohorts
        )

    def answered(self, reply: GroupReply) -> None:
        rows = list(range(reply.rows.start, reply.rows.stop)) if isinstance(reply.rows, slice) else reply.rows
        errors = {i: error.code for i, error in reply.errors.items()}
        outputs = [[] if i in errors else array[i].tolist() for i in range(len(rows)) for array in reply.outputs]
        self.log.append((rows, reply.positions.tolist(), outputs, errors))

    def step(self, session_id: str, steps: list[int], position: int | None, final: bool, now: float) -> None:
        work = submit(self.scheduler, session_id, inputs(*steps), now, now + 50, position=position, final=final)
        if isinstance(work, Chunk):
            self.chunks.append(work)
            work.listeners += (self.settled,)
        else:
            self.settled(work)

    def settled(self, outcome: object) -> None:
        if isinstance(outcome, Reply):
            self.log.append((outcome.position, [array.tolist() for array in outcome.outputs]))
        else:
            self.log.append(repr(outcome))

    def begin(self, now: float) -> None:
        actions, self.batch = self.scheduler.next_turn(now)
        for action in actions:
            self.scheduler.complete_action(action, action.run(), now)

    def end(self, now: float) -> None:
        batch, self.batch = self.batch, Batch()
        if batch.rows:
            self.scheduler.complete(batch, *self.engine.run(batch), now, 1e-3)

    def run(self, now: float = 0.0) -> None:
        while not self.scheduler.idle:
            self.begin(now)
            self.end(now)
            self.scheduler.check_invariants()

    def seen(self) -> list[tuple]:
        """Return every session, least recently used first, without a lookup that would detach it."""
        records = []
        for session in self.scheduler.sessions:
            if (cohort := session.cohort) is not None:
                position = int(cohort.positions[cohort.sessions.index(session)])
                expected, busy = position + (cohort.active is not None), cohort.active is not None
                used = cohort.last_used
            else:
                position, expected, used = session.position, session.expected, session.last_used
                busy = session.active is not None
            row = self.engine.rows[session.source]
            records.append((session.id, session.slot, position, expected, used, busy, session.applied is None, row))
        return records
