"""How chunks end: they complete, fail, or are cancelled.

A long chunk runs in pieces and is applied after its last piece. Until then its session does not change, so failing or
cancelling the chunk needs no rollback. A chunk of a durable session is applied once the store has it; until then it is
a `PendingCommit`.
"""

from collections import Counter

import numpy as np

from unroll.service.core.errors import InvalidRequest, PositionGap, SessionClosed, UnrollError
from unroll.service.core.session_ids import shown
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.admission import Admission
from unroll.service.scheduler.chunk import Action, Chunk, Group, PendingCommit, Step
from unroll.service.scheduler.counters import Counters
from unroll.service.scheduler.lanes import Lanes
from unroll.service.scheduler.limits import ModelTraits
from unroll.service.scheduler.replay import ReplayCache
from unroll.service.scheduler.reply import Outcome, Reply
from unroll.service.scheduler.session import OPEN, Life, Owner, Session
from unroll.service.scheduler.session_queue import SessionQueues
from unroll.service.scheduler.session_table import SessionTable
from unroll.service.state.slots import INITIAL
from unroll.service.store.record import Kept, Record

#: With two replicas in turn at random, only one run of 256 is longer than this.
_CHECKS = 8


class Completion:
    """Ends chunks with a reply or an error, and closes the sessions that end with them.

    Attributes:
        commits: Work that has run and is waiting to be committed.
        batch_rows: Rows of the batch that is being answered; 0 in between.
    """

    def __init__(
        self,
        traits: ModelTraits,
        admission: Admission,
        lanes: Lanes,
        queues: SessionQueues,
        sessions: SessionTable,
        replay: ReplayCache,
        counters: Counters,
    ) -> None:
        self._outputs = traits.outputs
        self.admission = admission
        self.lanes = lanes
        self.queues = queues
        self.sessions = sessions
        self.replay = replay
        self.counters = counters
        self.commits: list[PendingCommit] = []
        self.batch_rows = 0

    def take_in(self, chunk: Chunk, outputs: Tensors, steps: int, now: float) -> None:
        """Record that a batch ran the next `steps` steps of the chunk, with the model's `outputs` for them."""
        chunk.running = False
        self.admission.waiting_steps -= self.lanes.next_steps(chunk)
        chunk.done += steps
        if steps < chunk.length:
            pieces = chunk.pieces = chunk.pieces or []
            pieces.append(tuple([array.copy() for array in outputs]))
            if chunk.done < chunk.length:
                self._continue(chunk, now)
                return
            outputs = tuple(
                np.concatenate(parts) if spec.time else parts[-1]
                for spec, parts in zip(self._outputs, zip(*pieces, strict=True), strict=True)
            )
        session = chunk.session
        if session is None or session.durable is None:
            self.complete(chunk, outputs, now)
        else:
            chunk.running = True
            self.commits.append((chunk, outputs, {}))

    def take_commits(self) -> list[PendingCommit]:
        """Hand the work to be committed to the caller, who must pass it to `Commits.complete`."""
        commits, self.commits = self.commits, []
        return commits

    def complete(self, chunk: Chunk, outputs: Tensors, now: float) -> None:
        """Apply and answer a chunk after all steps have run and, if its session is durable, are in the store."""
        self.counters.chunks += 1
        self.counters.steps += chunk.length
        reply = Reply(outputs, chunk.start + chunk.length)
        session = chunk.session
        if session is not None:
            progress = session.progress
            assert progress is not None  # a session with a chunk is not in a cohort
            progress.position = reply.position
            session.source = session.slot
            # A chunk that ends its session is retried by its position.
            if chunk.pinned if chunk.final else session.applied is not None or len(chunk.inputs[0]) > 1:
                reply.kept = self.replay.remember(session, chunk.start, chunk.inputs, outputs, closes=chunk.final)
        self._end(chunk, reply, now)
        chunk.answer(reply)
        if chunk.final and session is not None and session.life is OPEN:
            self.close(session, now, self.replay.applied_chunks(session)[-1] if chunk.pinned else None)

    def adopt(self, session: Session, record: Record) -> None:
        """Continue the session from a record. The caller writes the record's state row, if it has one."""
        if (durable := session.durable) is not None:
            durable.token, durable.stale, durable.checks = record.token, False, _CHECKS
        progress = session.own_progress
        progress.position = progress.expected = record.position
        session.depth = max(session.depth, record.depth)
        self.replay.adopt(session, record.kept)
        session.source = session.slot if record.row else INITIAL

    def fail(self, chunk: Chunk, error: UnrollError, now: float) -> None:
        """Answer the chunk with an error, close the session if the chunk opened it, and renumber later chunks."""
        self._end(chunk, error, now)
        session = chunk.session
        misplaced = [] if session is None else self.queues.renumber(session)
        chunk.answer(error)
        if session is not None and chunk.opening is not None:
            self.close_unused(session, now)
        self._fail_misplaced(misplaced, now)

    def cancel(self, chunk: Chunk, error: UnrollError, now: float) -> None:
        """Fail the chunk. If it is running, it fails afterwards, unless that was its last piece."""
        if chunk.running:
            chunk.abandoned = error
        else:
            self.fail(chunk, error, now)

    def shed(self, now: float) -> None:
        """Refuse waiting chunks at the start of an overload: each owner keeps its oldest, up to an equal share."""
        waiting = [work for work in self.lanes if isinstance(work, Chunk) and work.may_be_shed]
        steps = Counter[Owner]()
        room = self.admission.most_waiting() / max(1, len({chunk.owner for chunk in waiting}))
        for chunk in waiting:
            steps[chunk.owner] += self.lanes.next_steps(chunk)
            if steps[chunk.owner] > room:
                self.fail(chunk, self.admission.refusal(), now)

    def close(self, session: Session, now: float, last: Kept | None = None) -> None:
        """Close a session. Waiting work fails with `session_closed`; running work completes first."""
        progress = session.own_progress
        accepted, active = progress.queue(), progress.active
        running = isinstance(active, Chunk) and active.running
        if isinstance(active, Group):
            active.followed = running = True
        progress.pending = None
        self.sessions.close(session, now, last, running=running)
        if session.life is Life.GONE:
            progress.active = None
        for work in accepted:
            error = SessionClosed(f"session {shown(session.id)!r} was closed")
            if isinstance(work, Chunk):
                self.cancel(work, error, now)
            elif isinstance(work, Action):
                work.answer(error)

    def close_unused(self, session: Session, now: float) -> None:
        """Close a session, if it is open, after the step that opened it has failed."""
        if session.life is OPEN:
            session.opened_with = b""  # nothing was applied, so the request may be retried
            self.close(session, now)
            if session.durable is not None:
                self.sessions.closed.forget(session.id)  # only the store knows whether the session exists

    def renumber(self, session: Session, now: float) -> None:
        """Assign new positions to accepted chunks, and fail those that are pinned to another."""
        self._fail_misplaced(self.queues.renumber(session), now)

    def _fail_misplaced(self, misplaced: list[tuple[Chunk, PositionGap]], now: float) -> None:
        for chunk, gap in misplaced:
            if chunk.outcome is None:  # a previous chunk's listener may have cancelled this one
                self._end(chunk, gap, now)
                chunk.answer(gap)

    def _continue(self, chunk: Chunk, now: float) -> None:
        error = chunk.abandoned or chunk.prepare_next()
        self.admission.waiting_steps += self.lanes.next_steps(chunk)
        if error is not None:
            self.fail(chunk, error, now)
        else:
            self.lanes.put(chunk, now)

    def _end(self, chunk: Chunk, outcome: Outcome, now: float) -> None:
        """Activate the session's next work; the caller then answers the chunk, which may bring a request."""
        chunk.outcome = outcome
        self.admission.in_flight -= 1
        if chunk.done < chunk.length:
            self.admission.waiting_steps -= self.lanes.next_steps(chunk)
        if chunk.workspace is not None:
            self.lanes.give_back_workspace(chunk)
        is_step = isinstance(chunk, Step)
        if isinstance(outcome, UnrollError) and not (is_step and isinstance(outcome, InvalidRequest)):
            self.counters.count_failed(outcome)
        session = chunk.session
        if session is not None and (progress := session.progress) is not None and progress.active is chunk:
            if is_step and progress.pending is None and session.life is OPEN:
                progress.active = None  # not `rest`, which would count as use
            else:
                self.queues.advance(session, now)
