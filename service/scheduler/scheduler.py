"""Decides which steps run next. Synchronous, without I/O or clock: it is given `now` and returns work.

A turn of the loop is:

    actions, batch = scheduler.next_turn(now)     # what to do, decided here
    outputs, failed = engine.run(batch)           # done elsewhere
    scheduler.finish(batch, outputs, failed, now) # replies settle here

Rules:

- A session has at most one chunk in a batch, and its chunks run in the order of their arrival.
- A group is one step, or a few, of many sessions that were idle: handled as one, whatever their number.
- Sessions whose group comes again become a cohort: then not even their positions are touched one by one.
- Short work is not kept waiting by long: long chunks are run in pieces, see `lanes.py`.
- A chunk counts as applied when its last piece is done: only then does the session's row change. Until then it
  works on a row of its own, so that cancelling, failing or missing the deadline leaves the session as it was.
- What a durable session's chunk led to is applied when it is in the store, and not before. If it cannot be put there,
  the copy here is stale: everything accepted for the session fails, and nothing is until it was looked up again.
- Of a durable session only new chunks are accepted on the word of the copy here, since their commit checks it. What
  would be an error, or a stored reply, is `NeedsStoreLookup` until the session was looked up (`is_verified`).
- Nothing waits without bound: past `max_queue` chunks, or when the deadline cannot be met, work is refused at once.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from unroll.service.core.errors import (
    Cancelled,
    DeadlineExceeded,
    DeadlineUnreachable,
    NeedsStoreLookup,
    PositionGap,
    QueueFull,
    SessionClosed,
    SessionError,
    SessionGone,
    UnrollError,
)
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.batch import Batch, row_of
from unroll.service.scheduler.chunk import Action, Chunk, Group, GroupReply, PendingCommit
from unroll.service.scheduler.lanes import Lanes, Pace
from unroll.service.scheduler.limits import ModelTraits, SchedulerLimits, SessionLimits
from unroll.service.scheduler.replay import ReplayCache
from unroll.service.scheduler.reply import AppliedChunk, Outcome, Reply, payload_digest
from unroll.service.scheduler.session import Cohort, Life, Session, Work
from unroll.service.scheduler.session_table import SessionTable
from unroll.service.state.slots import FIRST, INITIAL, Slots
from unroll.service.store.record import Origin, Record


@dataclass(slots=True)
class Counters:
    """What happened so far, for metrics; `gone` by the error code of the cause."""

    steps: int = 0
    chunks: int = 0
    batches: int = 0
    padded_steps: int = 0
    replayed: int = 0
    refused: int = 0
    opened: int = 0
    adopted: int = 0
    restarted: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict)


class Scheduler:
    """`is_verified(session_id)`: was the session looked up in the store for the call that is running?"""

    def __init__(
        self,
        traits: ModelTraits,
        sessions: SessionLimits,
        limits: SchedulerLimits,
        is_verified: Callable[[str], bool] = lambda session_id: False,
    ) -> None:
        self.traits = traits
        self._is_verified = is_verified
        self.limits = limits
        self.counters = Counters()
        #: Rows for chunks that are run in pieces, after those of the sessions.
        self.workspaces = Slots(limits.max_batch, first=FIRST + sessions.capacity)
        self.replay = ReplayCache(traits, self.rows)
        self.sessions = SessionTable(sessions, self.count_gone, self.replay.write_last_step)
        self.pace = Pace(limits)
        self._lanes = Lanes(traits, limits, self.workspaces, self.pace, self._is_over)
        self._actions: deque[Action] = deque()
        self._results: list[PendingCommit] = []
        self._in_flight = 0
        self._waiting_steps = 0

    @property
    def rows(self) -> int:
        """Rows the arena must have."""
        return self.workspaces.end

    @property
    def in_flight(self) -> int:
        """Chunks accepted and not yet answered."""
        return self._in_flight

    @property
    def idle(self) -> bool:
        return not self._actions and self._lanes.idle

    def __repr__(self) -> str:
        return f"<Scheduler {self._in_flight} chunks in flight, {self.sessions!r}>"

    # ── accepting work ───────────────────────────────────────────────────────────────────────────

    def open(
        self, session_id: str, now: float, *, position: int = 0, origin: Origin | None = None, token: bytes = b""
    ) -> Session:
        session = self.sessions.open(session_id, now, position=position, origin=origin, token=token)
        self.counters.opened += 1
        return session

    def submit_sequence(
        self, inputs: Tensors, now: float, deadline: float, *, row: np.ndarray | None = None, start: int = 0
    ) -> Chunk:
        """A sequence from the initial state, or from the state in `row`, reached after `start` steps; inputs: each
        (time, *shape)."""
        chunk = Chunk(inputs, len(inputs[0]), deadline, start=start)
        chunk.state_row = row
        self._admit(chunk, now)
        self._make_ready(chunk, now)
        return chunk

    def submit_steps(
        self,
        session_id: str,
        inputs: Tensors,
        now: float,
        deadline: float,
        *,
        position: int | None = None,
        start: bool = False,
        final: bool = False,
        origin: Origin | None = None,
        token: bytes = b"",
    ) -> Chunk | Reply:
        """Queue steps of a session; inputs: each (time, *shape).

        With `position`, a retry is recognised: of a chunk in flight (that chunk is returned, to be listened to), or of
        the last one applied (its Reply is returned). `start` opens the session first, unless this is the retry of the
        request that did; with `origin` as a durable one, in the place of the one that `token` wrote. `final` closes it
        afterwards. Raises SessionError, PositionGap, PositionTooOld, PayloadMismatch, QueueFull, DeadlineUnreachable or
        NeedsStoreLookup; the session is then untouched.
        """
        if final:
            reply = self.sessions.closed.reply_to(session_id, position, inputs, now)
            if reply is not None:
                self.counters.replayed += 1
                return reply
        opens = start and self.sessions.get_detached(session_id, now) is None
        if opens:
            self._open_by_steps(session_id, inputs, position, now, deadline, origin, token)
        session = self.sessions.find_detached(session_id, now)
        if session.durable is not None and session.durable.stale:
            raise NeedsStoreLookup(session_id)
        progress = session.own_progress
        pinned, start_at = position is not None, progress.expected if position is None else position
        chunk = Chunk(inputs, len(inputs[0]), deadline, session, start_at, pinned, opens, final)
        if chunk.start != progress.expected:
            return self._recognise(session, chunk)
        self._admit(chunk, now)
        progress.expected += chunk.length
        self._enqueue(session, chunk, now)
        return chunk

    def submit_group(
        self,
        sessions: Sequence[Session],
        positions: Sequence[int | None],
        inputs: Tensors,
        now: float,
        deadline: float,
        then: Callable[[GroupReply], None],
        *,
        again: bool = False,
    ) -> list[int]:
        """Queue the next steps of every session that is idle, and at the position said for it, if one was.

        inputs: each (len(sessions), time, *shape). Returns the rows that were not taken: their sessions are busy,
        gone, elsewhere, durable, or the row is a session's second; `submit_steps` takes them or says why not. The
        others are answered by one call of `then`, or one for each `max_batch` of them. Raises QueueFull or
        DeadlineUnreachable; nothing is queued then.

        `again`: they will step together again, most likely. The reply brings a cohort then, if they can be one.
        """
        steps = inputs[0].shape[1]
        if self._lanes.is_long(steps):
            return list(range(len(sessions)))
        self.sessions.expire(now)
        self.check_room(now, deadline)
        most = self._lanes.most_rows(steps)
        left: list[int] = []
        rows: list[int] = []
        group = Group([], rows, inputs, steps, deadline, then, again=again)
        for row, (session, position) in enumerate(zip(sessions, positions, strict=True)):
            progress = session.progress or self.sessions.cohorts.detach(session)
            at = progress.position
            if (
                progress.active is not None
                or session.life is not Life.OPEN
                or (position != at and position is not None)
                or session.durable is not None
            ):
                left.append(row)
                continue
            if len(rows) == most:
                self._queue_group(group, now)
                rows = []
                group = Group([], rows, inputs, steps, deadline, then, again=again)
            progress.active = group
            progress.expected = at + steps
            group.sessions.append(session)
            rows.append(row)
        if rows:
            self._queue_group(group, now)
        return left

    def submit_cohorts(
        self,
        cohorts: Sequence[Cohort],
        positions: np.ndarray | None,
        inputs: Tensors,
        now: float,
        deadline: float,
        then: Callable[[GroupReply], None],
    ) -> bool:
        """Queue the next step of every session of some cohorts, as `submit_group` does: all of them, or none.

        positions: said for each, if they were. inputs: each (sessions of all cohorts, 1, *shape). False, and nothing is
        queued, if a cohort is no more, or busy, or elsewhere; `submit_group` takes them or says why not.
        """
        self.sessions.expire(now)
        rows, end = [], 0
        for cohort in cohorts:
            part = slice(end, end := end + len(cohort.sessions))
            at = positions is None or np.array_equal(positions[part], cohort.positions)
            if not at or not cohort.formed or cohort.active is not None:
                return False
            rows.append(part)
        self.check_room(now, deadline)
        for cohort, part in zip(cohorts, rows, strict=True):
            some = tuple([array[part] for array in inputs])
            cohort.active = Group(cohort.sessions, part, some, 1, deadline, then, cohort=cohort, again=True)
            self._queue_group(cohort.active, now)
        return True

    def _queue_group(self, group: Group, now: float) -> None:
        if isinstance(group.rows, list) and len(group.rows) < len(group.inputs[0]):
            group.inputs = tuple(array[group.rows] for array in group.inputs)
        self._in_flight += len(group.sessions)
        self._waiting_steps += len(group.sessions) * group.length
        self._make_ready(group, now)

    def submit_action(self, session_id: str, run: Callable[[Session], object], now: float) -> Action:
        """Run `run(session)` between batches, after the session's chunks accepted so far."""
        session = self.sessions.find_detached(session_id, now)
        action = Action(session, lambda: run(session))
        self._enqueue(session, action, now)
        return action

    def set_retry_depth(self, session: Session, depth: int) -> None:
        """From now on the session's last `depth` chunks can be retried."""
        self.replay.set_depth(self.sessions.detach_from_cohort(session), depth)

    def adopt(self, session_id: str, record: Record, now: float) -> Session:
        """A session as it was stored, in the place of the copy that is here, which must be idle. Its state row is for
        the caller to put into `slot`, or to leave if the record has none. Raises CapacityExhausted."""
        session = self.sessions.get_detached(session_id, now)
        if session is not None and session.origin != record.origin:
            self.sessions.drop(session)
            session = None
        if session is None:
            session = self.sessions.open(session_id, now, origin=record.origin)
            session.opened_with = record.origin.opened_with
        assert session.active is None, session
        if session.durable is not None:
            session.durable.token, session.durable.stale = record.token, False
        progress = session.own_progress
        progress.position = progress.expected = record.position
        session.depth = max(session.depth, record.depth)
        session.applied = self.replay.read(record.kept)
        session.source = session.slot if record.row else INITIAL
        return session

    def close(self, session_id: str, now: float) -> Session:
        """Close at once: what waits fails with `session_closed`, what runs is finished and answered."""
        session = self.sessions.find_detached(session_id, now)
        self._close(session, now)
        return session

    def restart(self, session_id: str, now: float) -> Session:
        """Close a living session because its client began another under the same id; counted."""
        self.counters.restarted += 1
        return self.close(session_id, now)

    def cancel(self, chunk: Chunk, now: float) -> None:
        """Nobody waits for this chunk any more: it is dropped, unless the batch that completes it is running."""
        if chunk.outcome is None:
            self._abandon(chunk, Cancelled("the client went away"), now)

    # ── one turn ─────────────────────────────────────────────────────────────────────────────────

    def next_turn(self, now: float) -> tuple[list[Action], Batch]:
        """The actions to run first, then the batch, which is empty when nothing waits."""
        self.sessions.expire(now)
        batch = self._lanes.take(now)
        actions = [action for action in self._actions if action.outcome is None]
        self._actions.clear()
        if not batch and not actions:
            self.pace.rest()
        return actions, batch

    def finish_action(self, action: Action, outcome: object, now: float) -> None:
        action.settle(outcome)
        self._next_of(action.session, now)
        self._recount(action.session, now)

    def finish(
        self,
        batch: Batch,
        outputs: Tensors,
        failed: Mapping[int, UnrollError],
        now: float,
        seconds: float | None = None,
    ) -> list[PendingCommit]:
        """Take in what the engine made of each row: outputs (rows, longest, *shape), or (rows, *shape) without time.

        `seconds`: how long it took, for the estimate of waiting times. Returns what is to be put into the store, to be
        followed by `committed` for each; until then its sessions are busy.
        """
        steps, longest = batch.steps, batch.longest
        self.counters.batches += 1
        self.counters.padded_steps += len(batch) * longest - steps
        if seconds is not None:
            first = batch.work[0]
            self.pace.observe(steps, seconds, now, long=isinstance(first, Chunk) and self._lanes.is_long(first.length))
        if longest == 1 and not all(isinstance(work, Group) and work.cohort is not None for work in batch.work):
            self.replay.write_steps(batch.targets, batch.inputs, outputs, failed)
        row = 0
        for work in batch.work:
            if isinstance(work, Group):
                end = row + len(work.sessions)
                errors = {i - row: failed[i] for i in range(row, end) if i in failed} if failed else {}
                self._finish_group(work, tuple([array[row:end] for array in outputs]), errors, now)
                row = end
                continue
            work.running = False
            if row in failed:
                self._fail(work, failed[row], now)
            else:
                self._finish_chunk(work, self._result(outputs, row, batch.lens[row], longest), batch.lens[row], now)
            row += 1
        results, self._results = self._results, []
        return results

    def committed(self, result: PendingCommit, token: bytes, error: UnrollError | None, now: float) -> None:
        """The store has it, as the commit of that token, or it could not be put there."""
        chunk, session = result.chunk, result.session
        assert session.durable is not None
        chunk.running = False
        if error is None:
            session.durable.token = token
            self._apply(chunk, result.outputs, now)
            return
        session.durable.stale = True
        progress = session.own_progress
        behind, progress.pending = progress.pending or [], None
        self._fail(chunk, error, now)
        for work in behind:
            if isinstance(work, Chunk) and work.outcome is None:
                self._fail(work, error, now)
            elif isinstance(work, Action):
                work.settle(error)

    def _result(self, outputs: Tensors, row: int, steps: int, longest: int) -> Tensors:
        """One row's outputs, without the padding."""
        result = row_of(outputs, row)
        if steps == longest:
            return result
        return tuple(
            [array[:steps] if spec.time else array for spec, array in zip(self.traits.outputs, result, strict=True)]
        )

    def _finish_chunk(self, chunk: Chunk, result: Tensors, steps: int, now: float) -> None:
        self._waiting_steps -= self._lanes.next_steps(chunk)
        if steps == chunk.length:
            chunk.done = steps
            self._complete(chunk, result, now)
            return
        chunk.done += steps
        self._waiting_steps += self._lanes.next_steps(chunk)
        if chunk.pieces is None:
            chunk.pieces = []
        chunk.pieces.append(tuple(array.copy() for array in result))
        if chunk.done == chunk.length:
            joined = tuple(
                np.concatenate(parts) if spec.time else parts[-1]
                for spec, parts in zip(self.traits.outputs, zip(*chunk.pieces, strict=True), strict=True)
            )
            self._complete(chunk, joined, now)
        elif chunk.abandoned is not None:
            self._fail(chunk, chunk.abandoned, now)
        else:
            self._make_ready(chunk, now)

    def _complete(self, chunk: Chunk, outputs: Tensors, now: float) -> None:
        """All of its steps are run."""
        if chunk.session is None or chunk.session.durable is None:
            self._apply(chunk, outputs, now)
        else:
            chunk.running = True
            self._results.append(PendingCommit(chunk, chunk.session, outputs))

    def _finish_group(self, group: Group, outputs: Tensors, errors: dict[int, UnrollError], now: float) -> None:
        count = len(group.sessions)
        self._in_flight -= count
        self._waiting_steps -= count * group.length
        self.counters.chunks += count - len(errors)
        self.counters.steps += (count - len(errors)) * group.length
        cohort = group.cohort
        if cohort is not None and cohort.formed and not errors:
            cohort.last = group.inputs, outputs
            self.sessions.cohorts.step(cohort, now)
        else:
            if cohort is not None and len(errors) < count:
                self.sessions.detach_from_cohort(group.sessions[0])  # the cohort's last step is older than this one
                self.replay.write_steps(cohort.slots, group.inputs, outputs, errors)
            cohort = self._finish_rows(group, outputs, errors, now)
        positions = (
            cohort.positions
            if cohort is not None
            else np.array([session.position for session in group.sessions], np.uint64)
        )
        group.settle(GroupReply(group.rows, positions, outputs, errors, cohort))
        for row, follower in group.followers:
            follower.settle(errors.get(row) or Reply(row_of(outputs, row), int(positions[row])).copy())

    def _finish_rows(self, group: Group, outputs: Tensors, errors: dict[int, UnrollError], now: float) -> Cohort | None:
        """Move the sessions of a group on, one by one; returns what they have become, if it is to come again."""
        steps = group.length
        for row, session in enumerate(group.sessions):
            progress = session.progress or self.sessions.cohorts.detach(session)
            if row not in errors:
                progress.position += steps
                if session.applied is not None or steps > 1:
                    session.source = session.slot
                    begin = progress.position - steps
                    self.replay.remember(session, begin, row_of(group.inputs, row), row_of(outputs, row))
        if group.followed:
            for session in group.sessions:
                self._next_of(session, now)
        else:
            for session in group.sessions:
                self.sessions.rest(session, now)
        for row, error in errors.items():
            self._count_failed(error)
            self._recount(group.sessions[row], now)
        if group.again and not group.followed:
            return self.sessions.cohorts.form(group.sessions, now)
        return None

    def estimated_wait(self) -> float:
        """Seconds until work accepted now would begin, from the rate seen lately: one piece of each chunk first."""
        return self._waiting_steps * self.pace.seconds_per_step

    # ── accepting ────────────────────────────────────────────────────────────────────────────────

    def check_room(self, now: float, deadline: float, *, row: bool = False) -> None:
        """Raises QueueFull or DeadlineUnreachable if a chunk submitted now would be refused.

        With `row`, also CapacityExhausted if there would be no row for a new session.
        """
        if row:
            self.sessions.check_room()
        wait = self.estimated_wait()
        if self._in_flight >= self.limits.max_queue:
            self.counters.refused += 1
            raise QueueFull(f"{self._in_flight} requests are waiting", retry_after=max(wait, 0.1))
        if now + wait > deadline:
            self.counters.refused += 1
            raise DeadlineUnreachable(f"the wait is about {wait:.1f} s, longer than the deadline allows", wait)

    def _open_by_steps(
        self,
        session_id: str,
        inputs: Tensors,
        position: int | None,
        now: float,
        deadline: float,
        origin: Origin | None,
        token: bytes,
    ) -> None:
        """Unless the steps are a late duplicate of those that opened a session which is gone by now."""
        digest = payload_digest(inputs) if position == 0 else b""
        if digest and self.sessions.closed.was_opened_with(session_id, digest, now):
            raise self.sessions.closed.error(session_id, now)
        self.check_room(now, deadline, row=True)
        if origin is not None:
            origin = replace(origin, opened_with=digest)
        self.open(session_id, now, origin=origin, token=token).opened_with = digest

    def _admit(self, chunk: Chunk, now: float) -> None:
        if self._in_flight >= self.limits.max_queue or now + self.estimated_wait() > chunk.deadline:
            self.check_room(now, chunk.deadline)  # says what is wrong
        self._in_flight += 1
        self._waiting_steps += self._lanes.next_steps(chunk)

    def _recognise(self, session: Session, chunk: Chunk) -> Chunk | Reply:
        """What a chunk that does not begin at the session's end is: a retry, too old, or too early.

        Raises NeedsStoreLookup instead of all that, unless the copy here is certain to be what the store has.
        """
        certain = session.durable is None or self._is_verified(session.id)
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

    def _enqueue(self, session: Session, work: Chunk | Action, now: float) -> None:
        progress = session.own_progress
        if isinstance(progress.active, Group):
            progress.active.followed = True
        if progress.active is None:
            progress.active = work
            self._make_ready(work, now)
        elif progress.pending is None:
            progress.pending = [work]
        else:
            progress.pending.append(work)

    def _make_ready(self, work: Work, now: float) -> None:
        if isinstance(work, Action):
            self._actions.append(work)
        else:
            assert isinstance(work, Chunk | Group)
            self._lanes.put(work, now)

    def _is_over(self, work: Chunk | Group, now: float) -> bool:
        """Was it cancelled while it waited, or its session closed; or is it now too late to begin it?"""
        if isinstance(work, Group):
            if now >= work.deadline:
                outputs = tuple(np.zeros(0) for _ in self.traits.outputs)
                errors: dict[int, UnrollError] = dict.fromkeys(range(len(work.sessions)), _late())
                self._finish_group(work, outputs, errors, now)
        elif work.outcome is None and work.done == 0 and now >= work.deadline:
            self._fail(work, _late(), now)
        return work.outcome is not None

    # ── ending work ──────────────────────────────────────────────────────────────────────────────

    def _apply(self, chunk: Chunk, outputs: Tensors, now: float) -> None:
        session = chunk.session
        self.counters.chunks += 1
        self.counters.steps += chunk.length
        if session is None:
            self._settle(chunk, Reply(outputs, chunk.start + chunk.length), now)
            return
        session.position = chunk.start + chunk.length
        session.source = session.slot
        if session.applied is not None or chunk.length > 1 or chunk.final:
            self.replay.remember(session, chunk.start, chunk.inputs, outputs, closes=chunk.final)
        reply = Reply(outputs, session.position)
        self._settle(chunk, reply, now)
        if chunk.final and session.life not in (Life.LEAVING, Life.GONE):
            self._close(session, now, self.replay.applied_chunks(session)[-1] if chunk.pinned else None)

    def _settle(self, chunk: Chunk, outcome: Outcome, now: float) -> None:
        """Answer, and let the session's next work take its turn."""
        self._in_flight -= 1
        if chunk.done < chunk.length:
            self._waiting_steps -= self._lanes.next_steps(chunk)
        chunk.pieces = None
        if chunk.workspace is not None:
            self.workspaces.give_back(chunk.workspace)
        if isinstance(outcome, UnrollError):
            self._count_failed(outcome)
        chunk.settle(outcome)
        if chunk.session is not None and chunk.session.active is chunk:
            self._next_of(chunk.session, now)

    def _fail(self, chunk: Chunk, why: UnrollError, now: float) -> None:
        self._settle(chunk, why, now)
        if chunk.session is None:
            return
        if chunk.opens and chunk.session.life not in (Life.LEAVING, Life.GONE):
            chunk.session.opened_with = b""  # nothing was applied: the request may be tried again
            self._close(chunk.session, now)
            if chunk.session.durable is not None:
                self.sessions.closed.forget(chunk.session.id)  # the store knows whether there is one
        self._recount(chunk.session, now)

    def _next_of(self, session: Session, now: float) -> None:
        """The session's active work is done: the next that is still wanted becomes active."""
        progress = session.own_progress
        progress.active = None
        while progress.pending and progress.active is None:
            work = progress.pending.pop(0)
            progress.active = work if work.outcome is None else None
        if progress.active is not None:
            self._make_ready(progress.active, now)
        else:
            progress.pending = None
            self.sessions.rest(session, now)

    def _recount(self, session: Session, now: float) -> None:
        """What the session counted on did not come: give what waits its new place, or fail what insists on the old."""
        expected = session.position
        for work in session.own_progress.queue():
            if not isinstance(work, Chunk):
                expected += work.length
            elif work.pinned and work.start != expected:
                gap = f"the session is at {expected}, the chunk begins at {work.start}"
                self._settle(work, PositionGap(gap, expected=expected), now)
            else:
                work.start = expected
                expected += work.length
        session.own_progress.expected = expected

    def _abandon(self, chunk: Chunk, why: UnrollError, now: float) -> None:
        if chunk.running:
            chunk.abandoned = why
        else:
            self._fail(chunk, why, now)

    def _close(self, session: Session, now: float, last: AppliedChunk | None = None) -> None:
        progress = session.own_progress
        waiting, active = progress.queue(), progress.active
        running = isinstance(active, Chunk) and active.running
        if isinstance(active, Group):
            active.followed = running = True
        progress.pending = None
        self.sessions.close(session, now, last, running=running)
        if session.life is Life.GONE:
            progress.active = None
        for work in waiting:
            gone = SessionClosed(f"session {session.id!r} was closed")
            if isinstance(work, Chunk):
                self._abandon(work, gone, now)
            elif isinstance(work, Action):
                work.settle(gone)

    def _count_failed(self, error: UnrollError) -> None:
        self.counters.failed[error.code] = self.counters.failed.get(error.code, 0) + 1

    def count_gone(self, cause: type[SessionGone]) -> None:
        self.counters.gone[cause.code] = self.counters.gone.get(cause.code, 0) + 1

    def check_invariants(self) -> None:
        """Raises AssertionError if the bookkeeping contradicts itself. Meant for a moment when no batch runs."""
        self.sessions.check_invariants()
        waiting = [work for work in self._lanes if work.outcome is None]
        chunks = [work for work in waiting if isinstance(work, Chunk)]
        for cohort in self.sessions.cohorts:
            assert cohort.active is None or cohort.active in waiting, cohort
            assert cohort.active is None or (isinstance(cohort.active, Group) and cohort.active.cohort is cohort)
        for session in (session for session in self.sessions if session.cohort is None):
            ready = [work for work in waiting if work is session.active]
            assert len(ready) <= 1, f"{session!r} has two pieces of work ready"
            assert session.expected == session.position + sum(work.length for work in session.own_progress.queue()), (
                session
            )
        held = {chunk.workspace for chunk in chunks} - {None}
        assert len(held) == self.workspaces.taken, "a workspace is lost"
        if self.idle:
            assert self._in_flight == 0, f"{self._in_flight} chunks are lost"
            assert self._waiting_steps == 0, f"{self._waiting_steps} steps are lost"


def _late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before the work was begun")
