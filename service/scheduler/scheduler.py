"""Decides which steps run next. Synchronous, without I/O or clock: it is given `now` and returns work.

A turn of the loop is:

    actions, batch = scheduler.next_turn(now)     # what to do, decided here
    results = engine.run(batch)                   # done elsewhere
    scheduler.finish(batch, results, now)         # replies settle here

Rules:

- A session has at most one chunk in a batch, and its chunks run in the order of their arrival.
- Work waits in one lane per length class, so that rows of a batch are about equally long; the lane whose head has
  waited longest goes first. A long chunk is run in pieces and waits anew, behind the others, after each.
- A chunk counts as applied when its last piece is done: only then does the session's row change. Until then it
  works on a row of its own, so that cancelling, failing or missing the deadline leaves the session as it was.
- Nothing waits without bound: past `max_queue` chunks, or when the deadline cannot be met, work is refused at once.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from service.core.errors import (
    Cancelled,
    DeadlineExceeded,
    DeadlineUnreachable,
    PayloadMismatch,
    PositionGap,
    PositionTooOld,
    QueueFull,
    SessionClosed,
    SessionGone,
    UnrollError,
)
from service.engine.base import Tensors
from service.scheduler.sessions import SessionLimits, SessionTable
from service.scheduler.work import (
    Action,
    Applied,
    Batch,
    Chunk,
    Life,
    Outcome,
    Reply,
    Row,
    Session,
    payload_digest,
)
from service.state.slots import INITIAL, SCRATCH, Slots


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """What the scheduler must know of a model. `joins`: per output, True if pieces are joined over time, False if
    the last piece's output is the answer. `cuttable`: chunks may be run in pieces. `ragged`: rows of different
    length may share a batch."""

    joins: tuple[bool, ...]
    cuttable: bool
    ragged: bool


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """max_batch: rows in a batch. max_batch_steps: rows times steps. piece_steps: longest piece of a chunk.
    max_queue: chunks accepted and not yet answered."""

    max_batch: int = 256
    max_batch_steps: int = 2048
    piece_steps: int = 64
    max_queue: int = 8192


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
    restarted: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict)


class Scheduler:
    def __init__(self, traits: ModelTraits, sessions: SessionLimits, limits: SchedulerLimits) -> None:
        self.traits = traits
        self.limits = limits
        self.counters = Counters()
        self.sessions = SessionTable(sessions, on_gone=self._count_gone)
        #: Rows for chunks that are run in pieces, after those of the sessions.
        self.workspaces = Slots(limits.max_batch, first=self.sessions.slots.end)
        self._lanes: dict[int, deque[Chunk]] = {}
        self._actions: deque[Action] = deque()
        self._starved: deque[Chunk] = deque()  # they need a workspace, and all are taken
        self._order = 0
        self._in_flight = 0
        self._waiting_steps = 0
        #: Seconds a step has cost lately, everything included; the warm-up gives the first value.
        self.seconds_per_step = 0.0

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
        return not self._actions and not self._starved and not any(self._lanes.values())

    def __repr__(self) -> str:
        return f"<Scheduler {self._in_flight} chunks in flight, {self.sessions!r}>"

    # ── accepting work ───────────────────────────────────────────────────────────────────────────

    def open(self, session_id: str, now: float, *, position: int = 0) -> Session:
        session = self.sessions.open(session_id, now, position=position)
        self.counters.opened += 1
        return session

    def submit_sequence(self, inputs: Tensors, now: float, deadline: float) -> Chunk:
        """A whole sequence from the initial state; inputs: each (time, *shape)."""
        chunk = Chunk(inputs, len(inputs[0]), deadline)
        self._admit(chunk, now)
        self._make_ready(chunk)
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
    ) -> Chunk | Reply:
        """Queue steps of a session; inputs: each (time, *shape).

        With `position`, a retry is recognised: of a chunk in flight (that chunk is returned, to be listened to), or of
        the last one applied (its Reply is returned). `start` opens the session first, unless this is the retry of the
        request that did; `final` closes it afterwards. Raises SessionError, PositionGap, PositionTooOld,
        PayloadMismatch, QueueFull or DeadlineUnreachable; the session is then untouched.
        """
        digest = payload_digest(inputs)
        self.sessions.expire(now)
        ended = self.sessions.ended_by(session_id, now)
        if ended is not None and final and (position, digest) == (ended.start, ended.digest):
            self.counters.replayed += 1
            return ended.reply
        opens = start and session_id not in self.sessions
        if opens:
            self._open_by_steps(session_id, position, digest, now, deadline)
        session = self.sessions.find(session_id, now)
        if position is not None and position != session.expected:
            return self._recognise(session, position, digest, final)
        chunk = Chunk(
            inputs,
            len(inputs[0]),
            deadline,
            session,
            start=session.expected,
            pinned=position is not None,
            opens=opens,
            final=final,
            digest=digest,
        )
        self._admit(chunk, now)
        session.expected += chunk.length
        self._enqueue(session, chunk, now)
        return chunk

    def remembers(self, session_id: str, inputs: Tensors, now: float) -> bool:
        """Is this the request that opened or ended a session which is gone?"""
        digest = payload_digest(inputs)
        ended = self.sessions.ended_by(session_id, now)
        return (ended is not None and digest == ended.digest) or digest == self.sessions.opened_with(session_id, now)

    def submit_action(self, session_id: str, run: Callable[[Session], object], now: float) -> Action:
        """Run `run(session)` between batches, after the session's chunks accepted so far."""
        session = self.sessions.find(session_id, now)
        action = Action(session, lambda: run(session))
        self._enqueue(session, action, now)
        return action

    def close(self, session_id: str, now: float) -> Session:
        """Close at once: what waits fails with `session_closed`, what runs is finished and answered."""
        session = self.sessions.find(session_id, now)
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
        self._feed_starved(now)
        batch: Batch = []
        while not batch and (lane := self._oldest_lane()) is not None:
            batch = self._fill(lane, now)
        actions = [action for action in self._actions if action.outcome is None]
        self._actions.clear()
        return actions, batch

    def finish_action(self, action: Action, outcome: object, now: float) -> None:
        action.settle(outcome)
        self._next_of(action.session, now)
        self._recount(action.session, now)

    def finish(
        self, batch: Batch, results: Sequence[Tensors | UnrollError], now: float, seconds: float | None = None
    ) -> None:
        """Take in what the engine made of each row. `seconds`: how long it took, for the estimate of waiting times."""
        steps = sum(row.steps for row in batch)
        self.counters.batches += 1
        self.counters.padded_steps += len(batch) * max(row.steps for row in batch) - steps
        if seconds is not None:
            # Weighted by steps: the fixed cost of small batches says nothing of how long a full queue takes.
            self.seconds_per_step += (seconds / steps - self.seconds_per_step) * steps / (steps + 1000)
        for row, result in zip(batch, results, strict=True):
            chunk = row.chunk
            chunk.running = False
            if isinstance(result, UnrollError):
                self._fail(chunk, result, now)
                continue
            self._waiting_steps -= self._piece(chunk)
            chunk.done += row.steps
            self._waiting_steps += self._piece(chunk)
            chunk.pieces.append(result)
            if chunk.done == chunk.length:
                self._apply(chunk, now)
            elif chunk.abandoned is not None:
                self._fail(chunk, chunk.abandoned, now)
            else:
                if chunk.session is not None:
                    self.sessions.advance(chunk.session, "more")
                self._make_ready(chunk)

    def estimated_wait(self) -> float:
        """Seconds until work accepted now would begin, from the rate seen lately: one piece of each chunk first."""
        return self._waiting_steps * self.seconds_per_step

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

    def _open_by_steps(self, session_id: str, position: int | None, digest: bytes, now: float, deadline: float) -> None:
        """Unless the steps are a late duplicate of those that opened a session which is gone by now."""
        if position == 0 and digest == self.sessions.opened_with(session_id, now):
            raise self.sessions.loss(session_id, now)
        self.check_room(now, deadline, row=True)
        session = self.open(session_id, now)
        session.opened_with = digest if position == 0 else b""

    def _admit(self, chunk: Chunk, now: float) -> None:
        self.check_room(now, chunk.deadline)
        self._in_flight += 1
        self._waiting_steps += self._piece(chunk)

    def _recognise(self, session: Session, position: int, digest: bytes, final: bool) -> Chunk | Reply:
        """What a chunk that does not begin at the session's end is: a retry, too old, or too early."""
        if position > session.expected:
            raise PositionGap(
                f"the session is at {session.expected}, the chunk begins at {position}", expected=session.expected
            )
        known: tuple[bytes, Chunk | Reply] | None = None
        if session.last is not None and session.last.start == position:
            known = session.last.digest, session.last.reply
            if final and session.last.digest == digest:
                raise PayloadMismatch("the chunk was applied without ending the session", expected=session.expected)
        for work in session.queue():
            if isinstance(work, Chunk) and work.start == position:
                known = work.digest if work.final == final else b"", work
        if known is None:
            raise PositionTooOld(
                f"the session is at {session.expected}; only its last chunk can be asked for again",
                expected=session.expected,
            )
        if known[0] != digest:
            raise PayloadMismatch(
                f"position {position} was already consumed with another payload", expected=session.expected
            )
        self.counters.replayed += 1
        if isinstance(known[1], Chunk):
            known[1].abandoned = None  # its first client went away; now there is one again
        return known[1]

    def _enqueue(self, session: Session, work: Chunk | Action, now: float) -> None:
        self.sessions.advance(session, "accept")
        self.sessions.touch(session, now)
        if session.active is None:
            session.active = work
            self._make_ready(work)
        else:
            session.pending.append(work)

    # ── forming a batch ──────────────────────────────────────────────────────────────────────────

    def _make_ready(self, work: Chunk | Action) -> None:
        if isinstance(work, Action):
            self._actions.append(work)
            return
        self._order += 1
        work.order = self._order
        self._lanes.setdefault(self._length_class(work), deque()).append(work)

    def _piece(self, chunk: Chunk) -> int:
        remaining = chunk.length - chunk.done
        return min(remaining, self.limits.piece_steps) if self.traits.cuttable else remaining

    def _length_class(self, chunk: Chunk) -> int:
        """Steps a row of this chunk's lane is padded to at most."""
        piece = self._piece(chunk)
        return 1 << (piece - 1).bit_length() if self.traits.ragged else piece

    def _oldest_lane(self) -> int | None:
        for length in [length for length, lane in self._lanes.items() if not lane]:
            del self._lanes[length]
        return min(self._lanes, key=lambda length: self._lanes[length][0].order, default=None)

    def _fill(self, length: int, now: float) -> Batch:
        lane = self._lanes[length]
        most = min(self.limits.max_batch, max(1, self.limits.max_batch_steps // length))
        batch: Batch = []
        while lane and len(batch) < most:
            chunk = lane.popleft()
            if self._is_over(chunk, now):
                continue
            if (row := self._row(chunk)) is None:
                self._starved.append(chunk)
            else:
                chunk.running = True
                if chunk.session is not None:
                    self.sessions.advance(chunk.session, "dispatch")
                batch.append(row)
        return batch

    def _is_over(self, chunk: Chunk, now: float) -> bool:
        """Was it cancelled while it waited, or its session closed; or is it now too late to begin it?"""
        if chunk.outcome is None and chunk.done == 0 and now >= chunk.deadline:
            self._fail(chunk, DeadlineExceeded("the deadline passed before the work was begun"), now)
        return chunk.outcome is not None

    def _feed_starved(self, now: float) -> None:
        """Let as many chunks wait in the lanes again as there are workspaces for."""
        starved, self._starved = self._starved, deque()
        free = self.workspaces.count - self.workspaces.taken
        for chunk in starved:
            if self._is_over(chunk, now):
                continue
            if free > 0:
                self._make_ready(chunk)
                free -= 1
            else:
                self._starved.append(chunk)

    def _row(self, chunk: Chunk) -> Row | None:
        """None if the chunk needs a workspace and none is free."""
        steps = self._piece(chunk)
        last = chunk.done + steps == chunk.length
        if not last and chunk.workspace is None:
            chunk.workspace = self.workspaces.take()
            if chunk.workspace is None:
                return None
        session = chunk.session
        begin, end = (INITIAL, SCRATCH) if session is None else (session.source, session.slot)
        workspace = chunk.workspace if chunk.workspace is not None else SCRATCH
        inputs = chunk.inputs
        if steps < chunk.length:
            inputs = tuple(array[chunk.done : chunk.done + steps] for array in inputs)
        return Row(chunk, inputs, steps, begin if chunk.done == 0 else workspace, end if last else workspace)

    # ── ending work ──────────────────────────────────────────────────────────────────────────────

    def _apply(self, chunk: Chunk, now: float) -> None:
        session = chunk.session
        outputs = chunk.pieces[0]
        if len(chunk.pieces) > 1:
            outputs = tuple(
                np.concatenate(parts) if join else parts[-1]
                for join, parts in zip(self.traits.joins, zip(*chunk.pieces, strict=True), strict=True)
            )
        self.counters.chunks += 1
        self.counters.steps += chunk.length
        if session is None:
            self._settle(chunk, Reply(outputs, chunk.length), now)
            return
        session.position = chunk.start + chunk.length
        session.source = session.slot
        reply = Reply(outputs, session.position)
        session.last = Applied(chunk.start, chunk.digest, reply)
        self._settle(chunk, reply, now)
        if chunk.final and session.life not in (Life.LEAVING, Life.GONE):
            self._close(session, now, session.last if chunk.pinned else None)

    def _settle(self, chunk: Chunk, outcome: Outcome, now: float) -> None:
        """Answer, and let the session's next work take its turn."""
        self._in_flight -= 1
        self._waiting_steps -= self._piece(chunk)
        chunk.pieces = []
        if chunk.workspace is not None:
            self.workspaces.give_back(chunk.workspace)
        if isinstance(outcome, UnrollError):
            self.counters.failed[outcome.code] = self.counters.failed.get(outcome.code, 0) + 1
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
        self._recount(chunk.session, now)

    def _next_of(self, session: Session, now: float) -> None:
        """The session's active work is done: the next that is still wanted becomes active."""
        session.active = None
        while session.pending and session.active is None:
            work = session.pending.pop(0)
            session.active = work if work.outcome is None else None
        self.sessions.advance(session, "rest" if session.active is None else "more")
        self.sessions.touch(session, now)
        if session.active is not None:
            self._make_ready(session.active)

    def _recount(self, session: Session, now: float) -> None:
        """What the session counted on did not come: give what waits its new place, or fail what insists on the old."""
        expected = session.position
        for work in session.queue():
            if not isinstance(work, Chunk):
                continue
            if work.pinned and work.start != expected:
                gap = f"the session is at {expected}, the chunk begins at {work.start}"
                self._settle(work, PositionGap(gap, expected=expected), now)
            else:
                work.start = expected
                expected += work.length
        session.expected = expected

    def _abandon(self, chunk: Chunk, why: UnrollError, now: float) -> None:
        if chunk.running:
            chunk.abandoned = why
        else:
            self._fail(chunk, why, now)

    def _close(self, session: Session, now: float, last: Applied | None = None) -> None:
        waiting = session.queue()
        session.pending.clear()
        self.sessions.close(session, now, last)
        if session.life is Life.GONE:
            session.active = None
        for work in waiting:
            gone = SessionClosed(f"session {session.id!r} was closed")
            if isinstance(work, Chunk):
                self._abandon(work, gone, now)
            else:
                work.settle(gone)

    def _count_gone(self, cause: type[SessionGone]) -> None:
        self.counters.gone[cause.code] = self.counters.gone.get(cause.code, 0) + 1

    def check_invariants(self) -> None:
        """Raises AssertionError if the bookkeeping contradicts itself. Meant for a moment when no batch runs."""
        self.sessions.check_invariants()
        waiting = [chunk for lane in self._lanes.values() for chunk in lane if chunk.outcome is None]
        waiting += [chunk for chunk in self._starved if chunk.outcome is None]
        for session in self.sessions:
            ready = [chunk for chunk in waiting if chunk.session is session]
            assert len(ready) <= 1, f"{session!r} has two chunks ready"
            assert session.expected == session.position + sum(
                work.length for work in session.queue() if isinstance(work, Chunk)
            ), session
        held = {chunk.workspace for chunk in waiting} - {None}
        assert len(held) == self.workspaces.taken, "a workspace is lost"
        if self.idle:
            assert self._in_flight == 0, f"{self._in_flight} chunks are lost"
            assert self._waiting_steps == 0, f"{self._waiting_steps} steps are lost"
