"""Any order of events: each reply is the fold over its session's inputs, and no work is lost or mixed up."""

import os

import hypothesis.strategies as st
import numpy as np
from fold import INVALID, START, FoldEngine, Joiner, find, fold, inputs, scheduler, submit, submit_sequence
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from unroll.service.core.errors import EngineFailed, UnrollError
from unroll.service.scheduler.batch import Batch
from unroll.service.scheduler.chunk import Chunk, GroupReply, Opening
from unroll.service.scheduler.reply import Outcome, Reply
from unroll.service.scheduler.session import OPEN, Cohort, Session

#: `make machine-test` runs more examples.
EXAMPLES = int(os.environ.get("UNROLL_TEST_EXAMPLES", "25"))

IDS = st.sampled_from("abcd")
STEPS = st.lists(st.integers(0, 9), min_size=1, max_size=11)
BAD = 99


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(ragged=st.booleans(), cuttable=st.booleans(), rows=st.integers(1, 3))
    def begin(self, ragged: bool, cuttable: bool, rows: int) -> None:
        """rows: of a batch, so that steps often wait for more than one."""
        self.scheduler = scheduler(ragged=ragged, cuttable=cuttable, capacity=3, max_batch=rows, max_queue=1000)
        self.engine = FoldEngine(self.scheduler.rows)
        self.engine.failing = {BAD}
        self.now = self.begun = 0.0
        self.running = Batch()
        self.histories: dict[Session, list[int]] = {}
        self.open_chunks: list[Chunk] = []
        self.accepted = self.answered = self.grouped = 0
        self.cohorts: list[Cohort] = []
        self.joined: dict[Joiner, Session] = {}

    # ── the oracle ───────────────────────────────────────────────────────────────────────────────

    def accept(self, work: Chunk | Reply, steps: list[int]) -> None:
        if isinstance(work, Reply):
            assert work.outputs[0].tolist() == fold(steps, self.state_before(work, steps))
            return
        if work.listeners:  # a retry that joined the original
            return
        self.accepted += 1
        self.open_chunks.append(work)
        work.listeners += (lambda outcome: self.check(work, steps, outcome),)

    def state_before(self, reply: Reply, steps: list[int]) -> int:
        start = reply.position - len(steps)
        for history in self.histories.values():
            if history[start : reply.position] == steps:
                before = fold(history[:start])[-1] if start else START
                if fold(steps, before) == reply.outputs[0].tolist():
                    return before
        raise AssertionError("a reply was repeated that no session was given")

    def check(self, chunk: Chunk, steps: list[int], outcome: Outcome) -> None:
        self.answered += 1
        self.open_chunks.remove(chunk)
        if isinstance(outcome, UnrollError):
            assert BAD in steps or not isinstance(outcome, EngineFailed)
            return
        history = self.histories[chunk.session] if chunk.session is not None else []
        assert outcome.outputs[0].tolist() == fold(history + steps)[len(history) :]
        history.extend(steps)
        assert outcome.position == len(history)

    # ── events ───────────────────────────────────────────────────────────────────────────────────

    @rule(session_id=IDS)
    def open(self, session_id: str) -> None:
        try:
            self.histories[self.scheduler.open(session_id, self.now)] = []
        except UnrollError as error:
            assert error.code in {"session_exists", "capacity_exhausted"}

    @rule(session_id=IDS, steps=STEPS, offset=st.none() | st.integers(-12, 2), final=st.booleans(), start=st.booleans())
    def step(self, session_id: str, steps: list[int], offset: int | None, final: bool, start: bool) -> None:
        self.submit(session_id, steps, offset, final=final and offset == 0, start=start and offset is None)

    @rule(session_id=IDS, steps=STEPS)
    def bad_step(self, session_id: str, steps: list[int]) -> None:
        self.submit(session_id, [*steps, BAD], None)

    @rule(session_id=IDS)
    def retry(self, session_id: str) -> None:
        """Retry the last chunk a session applied: it gets the reply and changes nothing."""
        if session_id in self.scheduler.sessions:
            session = self.scheduler.sessions.find_detached(session_id, self.now)
            applied = self.scheduler.replay.applied_chunks(session)
            if applied:
                start = applied[-1].start
                steps = self.histories[session][start : session.position]
                work = submit(self.scheduler, session_id, inputs(*steps), self.now, self.now + 50, position=start)
                assert isinstance(work, Reply)
                self.accept(work, steps)

    @rule(ids=st.lists(IDS, min_size=1, max_size=6), data=st.data(), length=st.sampled_from([1, 1, 1, 2, 3, 5]))
    def group(self, ids: list[str], data: st.DataObject, length: int) -> None:
        """Send a frame for several sessions. A session may be busy, at another position, or listed twice."""
        sessions = [self.scheduler.sessions.find_detached(i, self.now) for i in ids if i in self.scheduler.sessions]
        if not sessions:
            return
        digits = st.lists(st.sampled_from([0, 1, 2, 3, BAD]), min_size=length, max_size=length)
        rows = [data.draw(digits) for _ in sessions]
        positions = [data.draw(st.sampled_from([None, s.position, s.position + 1])) for s in sessions]
        before = self.scheduler.in_flight
        taken: list[int] = []
        left = self.scheduler.groups.submit(
            sessions,
            positions,
            (np.array(rows),),
            self.now,
            self.now + 50,
            lambda reply: self.check_group(sessions, rows, reply),
            again=data.draw(st.booleans()),
        )
        taken = [row for row in range(len(sessions)) if row not in left]
        assert self.scheduler.in_flight - before == len(taken) == len({id(sessions[row]) for row in taken})
        for row in left:
            assert sessions[row].active is not None or positions[row] != sessions[row].position or length > 4
        self.accepted += len(taken)
        self.grouped += len(taken)

    @rule(
        session_id=IDS,
        step=st.sampled_from([0, 1, 2, 3, BAD, INVALID]),
        ahead=st.sampled_from([None, 0, 0, 1]),
        patience=st.sampled_from([5.0, 50.0]),
        final=st.booleans(),
    )
    def join(self, session_id: str, step: int, ahead: int | None, patience: float, final: bool) -> None:
        """Submit a step that joins a group if nothing waits. It opens its session if there is none."""
        session = self.scheduler.sessions.get_detached(session_id, self.now)
        position = None if ahead is None else (session.position if session else 0) + ahead
        deadline = self.now + patience
        chunk = Chunk(inputs(step), session, position, final=final)
        if session is None:
            if ahead == 1 or step == INVALID:  # refused before the session is opened
                return
            chunk.opening = Opening(session_id)

        def then(outcome: list[int] | UnrollError) -> None:
            self.leave(joiner)
            history = self.histories[session]
            if not isinstance(outcome, UnrollError):
                assert self.begun < deadline
                assert not final or session.life is not OPEN
                history.append(step)
                assert outcome == fold(history)[-1:]
            elif outcome.code == "deadline_exceeded":
                assert self.now >= deadline
            else:
                code = {BAD: "engine_failed", INVALID: "non_finite_input"}.get(step)
                assert outcome.code in (code, "session_closed")
                assert chunk.opening is None or session.life is not OPEN

        joiner = Joiner(then)
        try:
            joins = self.scheduler.join(chunk, self.now, deadline, joiner)
        except UnrollError as error:
            assert error.code in {"capacity_exhausted", "queue_full", "session_closed"}
            return
        session = chunk.session
        assert session is not None
        self.histories.setdefault(session, [])
        if joins:
            assert ahead != 1
            self.joined[joiner] = session
            self.accepted += 1
            self.grouped += 1
        elif chunk.opening is not None:
            self.accept(self.scheduler.submit(chunk, self.now, deadline), [step])

    def leave(self, joiner: Joiner) -> None:
        del self.joined[joiner]
        self.answered += 1
        self.grouped -= 1

    @rule(index=st.integers(0, 50))
    def cancel_joined(self, index: int) -> None:
        if self.joined:
            joiner, session = [*self.joined.items()][index % len(self.joined)]
            before = self.scheduler.in_flight
            self.scheduler.joined.cancel(session, joiner, self.now)
            if self.scheduler.in_flight < before:
                self.leave(joiner)

    @rule(data=st.data(), said=st.sampled_from([None, 0, 0, 1]))
    def cohort(self, data: st.DataObject, said: int | None) -> None:
        """Submit the next step of a cohort, if the cohort is still intact."""
        if not self.cohorts:
            return
        cohort = data.draw(st.sampled_from(self.cohorts))
        rows = [[data.draw(st.sampled_from([0, 1, 2, 3, BAD]))] for _ in cohort.sessions]
        positions = None if said is None else cohort.positions + np.uint64(said)
        free = cohort.formed and cohort.active is None
        taken = self.scheduler.groups.submit_cohorts(
            [cohort],
            positions,
            (np.array(rows),),
            self.now,
            self.now + 50,
            lambda reply: self.check_group(cohort.sessions, rows, reply),
        )
        assert free or not taken
        assert said != 1 or not taken
        self.accepted += len(rows) if taken else 0
        self.grouped += len(rows) if taken else 0

    def check_group(self, sessions: list[Session], rows: list[list[int]], reply: GroupReply) -> None:
        self.answered += len(reply.positions)
        self.grouped -= len(reply.positions)
        if reply.cohort is not None and reply.cohort not in self.cohorts:
            self.cohorts.append(reply.cohort)
        for i, row in enumerate(reply.rows if isinstance(reply.rows, list) else range(len(sessions))):
            history = self.histories[sessions[row]]
            if i in reply.errors:
                assert BAD in rows[row] or reply.errors[i].code == "deadline_exceeded"
            else:
                assert reply.outputs[0][i].tolist() == fold(history + rows[row])[len(history) :]
                history.extend(rows[row])
            assert reply.positions[i] == len(history)

    def submit(self, session_id: str, steps: list[int], offset: int | None, **flags: bool) -> None:
        known = {
            session.id: self.scheduler.sessions.detach_from_cohort(session) for session in [*self.scheduler.sessions]
        }
        position = None
        if offset is not None and session_id in known:
            position = max(0, known[session_id].expected + offset)
        before = repr(known.get(session_id))
        try:
            work = submit(
                self.scheduler, session_id, inputs(*steps), self.now, self.now + 50, position=position, **flags
            )
        except UnrollError as error:
            assert error.code in {
                "session_unknown", "session_closed", "session_expired", "session_evicted", "position_gap",
                "position_too_old", "payload_mismatch", "queue_full", "capacity_exhausted",
            }  # fmt: skip
            assert repr(known.get(session_id)) == before
            return
        if isinstance(work, Chunk) and work.session is not None:
            self.histories.setdefault(work.session, [])
        self.accept(work, steps)

    @rule(steps=STEPS)
    def sequence(self, steps: list[int]) -> None:
        self.accept(submit_sequence(self.scheduler, inputs(*steps), self.now, self.now + 50), steps)

    @rule(session_id=IDS, new_id=IDS)
    def fork(self, session_id: str, new_id: str) -> None:
        def copy(session: Session) -> None:
            if new_id in self.scheduler.sessions:
                return
            try:
                forked = self.scheduler.open(new_id, self.now, position=session.position)
            except UnrollError:
                return
            if session.source != 0:
                self.engine.rows[forked.slot] = self.engine.rows[session.source]
                forked.source = forked.slot
            self.histories[forked] = list(self.histories[session])

        if session_id in self.scheduler.sessions:
            self.scheduler.submit_action(find(self.scheduler, session_id, self.now), copy, self.now)

    @rule(session_id=IDS)
    def close(self, session_id: str) -> None:
        if session_id in self.scheduler.sessions:
            self.scheduler.close(find(self.scheduler, session_id, self.now), self.now)

    @rule(index=st.integers(0, 50))
    def cancel(self, index: int) -> None:
        if self.open_chunks:
            self.scheduler.cancel(self.open_chunks[index % len(self.open_chunks)], self.now)

    @rule(seconds=st.sampled_from([0.1, 10.0, 60.0, 101.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.scheduler.sessions.expire(self.now)

    @rule()
    def begin_batch(self) -> None:
        """Start a batch and leave it running during other events, as in a thread."""
        if not self.running.rows:
            self.begun = self.now
            actions, self.running = self.scheduler.next_turn(self.now)
            for action in actions:
                self.scheduler.complete_action(action, action.run(), self.now)

    @rule(seconds=st.sampled_from([1e-4, 1e-3, 1e-1]))
    def end_batch(self, seconds: float = 1e-3) -> None:
        if self.running.rows:
            batch, self.running = self.running, Batch()
            self.scheduler.complete(batch, *self.engine.run(batch), self.now, seconds)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "scheduler") and not self.running.rows:
            self.scheduler.check_invariants()
            assert self.accepted - self.answered == self.scheduler.in_flight == len(self.open_chunks) + self.grouped

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            self.end_batch()
            while not self.scheduler.idle:
                self.begin_batch()
                self.end_batch()
            self.nothing_is_lost()
            assert self.scheduler.in_flight == 0


SchedulerMachine.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=60, deadline=None)
test_scheduler_machine = SchedulerMachine.TestCase
