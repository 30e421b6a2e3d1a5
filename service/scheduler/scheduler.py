"""The scheduler decides which steps run next. It is synchronous and has neither I/O nor a clock: `now` is an argument.

One turn of the loop:

    actions, batch = scheduler.next_turn(now)        # decide
    outputs, failed = engine.run(batch)              # run
    scheduler.complete(batch, outputs, failed, now)  # answer

Rules, and the files that implement them:

- Waiting is bounded: beyond `max_queue` chunks, or if the deadline cannot be met, work is refused immediately
  (`admission.py`).
- A session has at most one chunk in a batch, and its chunks run in order of arrival (`session_queue.py`).
- Long work does not block short work: long chunks run in pieces (`lanes.py`).
- A chunk completes, fails or is cancelled (`completion.py`). It is applied after its last piece and, if the session is
  durable, after its commit. Until then the session does not change.
- The steps of one frame form a group (`groups.py`); sessions that repeatedly step together form a cohort
  (`cohorts.py`).
- A retry gets the original reply (`replay.py`); a request to a closed session gets the reason (`closed_sessions.py`).
- The local copy of a durable session suffices to accept a new chunk, because the commit verifies the copy. An error or
  a remembered reply requires a session that was just verified with the store; otherwise `NeedsStoreLookup` is raised.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from unroll.service.core.errors import (
    Cancelled,
    DeadlineExceeded,
    NeedsStoreLookup,
    SessionError,
    UnrollError,
)
from unroll.service.core.session_ids import tenant_of
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.admission import Admission, Pace
from unroll.service.scheduler.batch import Batch
from unroll.service.scheduler.chunk import Action, Chunk, Group, Opening, PendingCommit, StepListener
from unroll.service.scheduler.commits import Commits
from unroll.service.scheduler.completion import Completion
from unroll.service.scheduler.counters import Counters
from unroll.service.scheduler.groups import Groups
from unroll.service.scheduler.joined_steps import JoinedSteps
from unroll.service.scheduler.lanes import Lanes
from unroll.service.scheduler.limits import ModelTraits, SchedulerLimits, SessionLimits
from unroll.service.scheduler.replay import ReplayCache
from unroll.service.scheduler.reply import Reply, payload_digest, to_bytes
from unroll.service.scheduler.rollout import Rollouts
from unroll.service.scheduler.session import Session, Work
from unroll.service.scheduler.session_queue import SessionQueues
from unroll.service.scheduler.session_table import SessionTable
from unroll.service.state.slots import FIRST, Slots
from unroll.service.store.record import Origin, Record


class Scheduler:
    """All sessions of one model on one device, and their work.

    Args:
        is_verified: Whether the current call has looked up this session id in the store.
        spill: Offered each session that is about to be evicted; see `SessionTable`.

    Attributes:
        workspaces: Arena rows for chunks that run in pieces; they follow the sessions' rows.
    """

    def __init__(
        self,
        traits: ModelTraits,
        sessions: SessionLimits,
        limits: SchedulerLimits,
        is_verified: Callable[[str], bool] = lambda session_id: False,
        spill: Callable[[Session, bool], bool] = lambda session, at_cost: False,
    ) -> None:
        self.traits = traits
        self.is_verified = is_verified
        self.limits = limits
        self.counters = Counters()
        self.rollouts = Rollouts(limits, self.counters)
        self.workspaces = Slots(limits.max_batch, first=FIRST + sessions.capacity)
        self.replay = ReplayCache(traits, self.rows, sessions.reply_bytes)
        self.sessions = SessionTable(
            sessions, self.counters.count_gone, self.replay.write_last_step, spill, self.replay.forget
        )
        self.pace = Pace(limits)
        self.lanes = Lanes(
            traits, limits, self.workspaces, self.pace, self._is_over, lambda steps, now: self.joined.group(steps, now)
        )
        self.admission = Admission(limits, self.pace, self.counters, self.lanes.owners)
        self.overload = self.admission.overload
        self._queues = SessionQueues(self.lanes, self.sessions)
        self._completion = Completion(
            traits, self.admission, self.lanes, self._queues, self.sessions, self.replay, self.counters
        )
        self.groups = Groups(self._completion)
        self.commits = Commits(self._completion, self.groups)
        self.joined = JoinedSteps(traits, self._completion)

    @property
    def rows(self) -> int:
        return self.workspaces.end

    @property
    def answered_rows(self) -> int:
        """Rows of the batch that is being answered, for listeners; 0 in between."""
        return self._completion.batch_rows

    @property
    def in_flight(self) -> int:
        """Chunks accepted and not yet answered."""
        return self.admission.in_flight

    @property
    def idle(self) -> bool:
        return not self._queues.actions and self.lanes.idle

    def __repr__(self) -> str:
        return f"<Scheduler {self.admission.in_flight} chunks in flight, {self.sessions!r}>"

    # ── accepting work ───────────────────────────────────────────────────────────────────────────

    def open(
        self, session_id: str, now: float, *, position: int = 0, origin: Origin | None = None, token: bytes = b""
    ) -> Session:
        session = self.sessions.open(session_id, now, position=position, origin=origin, token=token)
        self.counters.opened += 1
        return session

    def submit(self, chunk: Chunk, now: float, deadline: float) -> Chunk | Reply:
        """Queue a chunk. A chunk with neither a session nor an opening is a stateless sequence.

        Returns:
            The chunk itself. For a retry: the accepted chunk, or the reply if that chunk was applied.

        Raises:
            SessionError: The session is not open, or the chunk has the wrong position.
            Overloaded: There is no room for the chunk, or for the session that it opens.
            NeedsStoreLookup: The session must first be looked up in the store.
            In each case nothing has changed.
        """
        chunk.deadline, session = deadline, chunk.session
        if session is None:
            if chunk.opening is None:
                self.admission.admit(chunk, self.lanes.next_steps(chunk), now)
                self.lanes.put(chunk, now)
                return chunk
            session = chunk.session = self._open_with(chunk, chunk.opening, now)
        progress = self.sessions.require_open(session, now)
        if session.durable is not None and session.durable.stale:
            raise NeedsStoreLookup(session.id)
        if not chunk.pinned:
            chunk.start = progress.expected
        elif chunk.start != progress.expected:
            self.joined.check(session, now)
            self.sessions.require_open(session, now)  # a failed step closes the session that it opened
            if chunk.start != progress.expected:
                return self._recognise(session, chunk)
        self.admission.admit(chunk, self.lanes.next_steps(chunk), now)
        progress.expected += chunk.length
        self._queues.add(progress, chunk, now)
        return chunk

    def join(self, chunk: Chunk, now: float, deadline: float, listener: StepListener) -> bool:
        """Queue a chunk of one step as a `Step`; False if it must be submitted. Raises like `submit`."""
        chunk.deadline, session = deadline, chunk.session
        if session is None:
            assert chunk.opening is not None
            session = chunk.session = self._open_with(chunk, chunk.opening, now)
        if chunk.final and chunk.pinned:  # its reply is kept for retries
            return False
        position, step = chunk.start if chunk.pinned else None, to_bytes(chunk.inputs)
        return self.joined.join(session, position, step, now, deadline, listener, chunk.opening, ends=chunk.final)

    def replay_closing(self, session_id: str, chunk: Chunk, now: float) -> Reply | None:
        """The reply to the chunk that closed the session, if `chunk` is a retry."""
        if not chunk.final or not chunk.pinned:
            return None
        last = self.sessions.closed.closing_chunk(session_id, chunk.start, chunk.inputs, now)
        self.counters.replayed += last is not None
        return None if last is None else self.replay.reply_of(last)

    def submit_action(self, session: Session, run: Callable[[Session], object], now: float) -> Action:
        """Run `run(session)` between batches, after the chunks that the session has accepted so far.

        Raises SessionError if the session is not open.
        """
        progress = self.sessions.require_open(session, now)
        action = Action(session, lambda: run(session))
        self._queues.add(progress, action, now)
        return action

    def set_retry_depth(self, session: Session, depth: int) -> None:
        """Keep the session's last `depth` chunks for retries."""
        self.replay.set_depth(self.sessions.detach_from_cohort(session), depth)

    def adopt(self, session_id: str, record: Record, now: float) -> Session:
        """Load a session from its record, replacing the local copy, which must be idle.

        The caller writes the record's state row, if there is one, to the session's `slot`. Raises CapacityExhausted.
        """
        session = self.sessions.get_detached(session_id, now)
        if session is not None and session.origin != record.origin:
            self.sessions.drop(session)
            session = None
        if session is None:
            session = self.sessions.open(session_id, now, origin=record.origin)
            session.opened_with = record.origin.opened_with
        assert session.active is None, session
        self._completion.adopt(session, record)
        return session

    def close(self, session: Session, now: float) -> None:
        """Close a session. Waiting work fails with `session_closed`; running work is completed and answered.

        Raises SessionError if the session is not open.
        """
        self.sessions.require_open(session, now)
        self._completion.close(session, now)

    def restart(self, session: Session, now: float) -> None:
        """Close a session because its client opened another under the same id; counted as a restart."""
        self.counters.restarted += 1
        self.close(session, now)

    def cancel(self, chunk: Chunk, now: float) -> None:
        """Cancel the chunk of a client that disconnected, unless the running batch completes it."""
        if chunk.outcome is None:
            self._completion.cancel(chunk, Cancelled("the client disconnected"), now)

    # ── one turn ─────────────────────────────────────────────────────────────────────────────────

    def next_turn(self, now: float) -> tuple[list[Action], Batch]:
        """The actions to run first, and the batch, which is empty if nothing is waiting."""
        self.sessions.expire(now)
        batch = self.lanes.take(now)
        return self._queues.take_actions() if self._queues.actions else [], batch

    def complete_action(self, action: Action, outcome: object, now: float) -> None:
        """Answer an action that has run, and activate the session's next work."""
        action.answer(outcome)
        self._queues.advance(action.session, now)
        self._completion.renumber(action.session, now)

    def complete(
        self,
        batch: Batch,
        outputs: Tensors,
        failed: Mapping[int, UnrollError],
        now: float,
        seconds: float | None = None,
    ) -> list[PendingCommit]:
        """Answer the work of a batch that has run.

        Args:
            outputs: Each (rows, longest, *shape), or (rows, *shape) without time.
            failed: Errors by row.
            seconds: Duration of the batch, used to estimate waiting times.

        Returns:
            Work to commit to the store. Its sessions stay busy until `Commits.complete`.
        """
        steps, longest = batch.steps, batch.longest
        self._completion.batch_rows = batch.rows
        self.counters.batches += 1
        self.counters.padded_steps += batch.rows * longest - steps
        if seconds is not None:
            first = batch.work[0]
            self.pace.observe(steps, seconds, now, long=isinstance(first, Chunk) and self.lanes.is_long(first.length))
        if longest == 1 and not all(isinstance(work, Group) and work.cohort is not None for work in batch.work):
            self.replay.write_steps(batch.targets, batch.inputs, outputs, failed)
        take_in, outputs_of = self._completion.take_in, batch.outputs_of
        row = 0
        for work in batch.work:
            if isinstance(work, Group):
                end = row + len(work.sessions)
                errors = {i - row: failed[i] for i in range(row, end) if i in failed} if failed else {}
                self.groups.take_in(work, outputs_of(slice(row, end), work.length, outputs, self.traits), errors, now)
                row = end
                continue
            if row in failed:
                work.running = False
                self._completion.fail(work, failed[row], now)
            else:
                ran = batch.lens[row]
                take_in(work, outputs_of(row, ran, outputs, self.traits), ran, now)
            row += 1
        self._completion.batch_rows = 0
        if self.admission.begins_overload(batch.rows, now):
            self._completion.shed(now)
        return self._completion.take_commits() if self._completion.commits else []

    def estimated_wait(self) -> float:
        """Seconds until work accepted now would begin, at the current pace."""
        return self.admission.estimated_wait()

    def check_room(self, now: float, deadline: float, session_id: str) -> None:
        """Check that a chunk that opens this session would be accepted now.

        Raises QueueFull, DeadlineUnreachable or CapacityExhausted.
        """
        self.sessions.check_room()
        self.admission.check(now, deadline, tenant_of(session_id) or 0, patient=False)

    def _open_with(self, chunk: Chunk, opening: Opening, now: float) -> Session:
        """Open the chunk's session. Raises SessionGone for a late duplicate of a chunk that opened one before."""
        session_id, origin = opening.session_id, opening.origin
        digest = payload_digest(chunk.inputs) if chunk.pinned and chunk.start == 0 else b""
        if digest and self.sessions.closed.was_opened_with(session_id, digest, now):
            raise self.sessions.closed.error(session_id, now)
        self.check_room(now, chunk.deadline, session_id)
        if origin is not None:
            origin = replace(origin, opened_with=digest)
        session = self.open(session_id, now, origin=origin, token=opening.token)
        session.opened_with = digest
        return session

    def _recognise(self, session: Session, chunk: Chunk) -> Chunk | Reply:
        """Answer a chunk at another position than the session's: replay a retry, else raise a SessionError.

        Raises NeedsStoreLookup instead, unless the local copy of the session is verified.
        """
        certain = session.durable is None or self.is_verified(session.id)
        try:
            known = self.replay.recognise(session, chunk)
        except SessionError:
            if certain:
                raise
            raise NeedsStoreLookup(session.id) from None
        if not certain and isinstance(known, Reply):
            raise NeedsStoreLookup(session.id)
        self.counters.replayed += 1
        return known

    def _is_over(self, work: Chunk | Group, now: float) -> bool:
        """Whether the work has been answered. Work past its deadline fails here."""
        if now >= work.deadline:
            late = DeadlineExceeded("the deadline passed before the work started")
            if isinstance(work, Group):
                self.groups.fail(work, late, now)
            elif work.is_new:
                self._completion.fail(work, late, now)
        return work.outcome is not None

    def check_invariants(self) -> None:
        """Raises AssertionError if the data structures are inconsistent. Call it only while no batch is running."""
        self.sessions.check_invariants()
        self.replay.check_invariants(self.sessions.everyone)
        self.lanes.check_invariants()
        waiting = [work for work in self.lanes if work.outcome is None]
        owned: dict[int, Work] = {id(work): work for work in waiting}
        for cohort in self.sessions.cohorts:
            assert cohort.active is None or cohort.active in waiting, cohort
            assert cohort.active is None or (isinstance(cohort.active, Group) and cohort.active.cohort is cohort)
        for session in (session for session in self.sessions if session.cohort is None):
            assert sum(work is session.active for work in waiting) <= 1, f"{session!r} has two pieces of work ready"
            owned |= {id(work): work for work in session.own_progress.queue()}
        rows = [len(work.sessions) if isinstance(work, Group) else 1 for work in owned.values() if work.length]
        assert sum(rows) == self.in_flight, f"{self.in_flight - sum(rows)} chunks are in flight without an owner"
        if self.idle:
            self.admission.check_invariants()
