"""A cohort changes nothing but the cost: any order of events gives what it gives without, and leaves the same."""

import hypothesis.strategies as st
import numpy as np
import pytest
from fold import FoldEngine, answer, find, fold, inputs, run_until_idle, scheduler, submit, submit_sequence
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from unroll.service.core.errors import (
    DeadlineUnreachable,
    PayloadMismatch,
    QueueFull,
    SessionEvicted,
    SessionExpired,
    UnrollError,
)
from unroll.service.scheduler.batch import Batch
from unroll.service.scheduler.chunk import Chunk, GroupReply
from unroll.service.scheduler.recency import Recency, Used
from unroll.service.scheduler.reply import Reply
from unroll.service.scheduler.scheduler import Scheduler
from unroll.service.scheduler.session import Cohort, Session

LATER = 1e9
BAD = 99
IDS = st.sampled_from("abcde")


class Served:
    """A scheduler, and an engine. cohorts: are sessions that come together made one?"""

    def __init__(self, *, cohorts: bool, capacity: int = 4, max_batch: int = 3) -> None:
        self.scheduler: Scheduler = scheduler(capacity=capacity, max_batch=max_batch)
        self.engine = FoldEngine(self.scheduler.rows)
        self.engine.failing = {BAD}
        self.batch = Batch()
        self.log: list[object] = []  # what was answered
        self.chunks: list[Chunk] = []
        self.bound: dict[str, Session] = {}  # as a stream holds them: whatever has become of them, and without a look
        self.as_cohorts = 0
        self._cohorts = cohorts
        self._lineups: dict[tuple[Session, ...], list[Cohort]] = {}

    def open(self, session_id: str, now: float) -> str:
        self.bound[session_id] = self.scheduler.open(session_id, now)
        return repr(self.bound[session_id])

    def frame(self, ids: list[str], positions: list[int | None], values: list[int], now: float) -> list[int]:
        """A step of each; returns the rows that are not taken."""
        sessions = [self.bound[i] for i in ids]
        rows = (np.array(values)[:, np.newaxis],)
        known = self._lineups.get(key := tuple(sessions), [])
        again, said = key in self._lineups, [position for position in positions if position is not None]
        if sum(len(cohort.sessions) for cohort in known) == len(ids) and len(said) in (0, len(ids)):
            at = np.array(said, np.uint64) if said else None
            if self.scheduler.submit_cohorts(known, at, rows, now, now + 50, self.answered):
                self.as_cohorts += 1
                return []
        cohorts: list[Cohort] = []

        def then(reply: GroupReply) -> None:
            self.answered(reply)
            cohorts.extend([reply.cohort] if reply.cohort is not None else [])

        self._lineups[key] = cohorts
        return self.scheduler.submit_group(
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
        if batch:
            self.scheduler.complete(batch, *self.engine.run(batch), now, 1e-3)

    def run(self, now: float = 0.0) -> None:
        while not self.scheduler.idle:
            self.begin(now)
            self.end(now)
            self.scheduler.check_invariants()

    def seen(self) -> list[tuple]:
        """Every session, least recently used first, without looking at it."""
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


class Twins(RuleBasedStateMachine):
    """The same happens to both, and one forms cohorts."""

    @initialize()
    def begin(self) -> None:
        self.one, self.other = Served(cohorts=True), Served(cohorts=False)
        self.now = 0.0
        self.ids: list[str] = []  # of the last frame
        for session_id in "abc":
            self.both(Served.open, session_id, 0.0)
        self.frames(value=1, turns=2, unsaid=True, answered=True)

    def both(self, do, *arguments: object) -> None:
        outcomes = []
        for served in (self.one, self.other):
            try:
                outcomes.append(do(served, *arguments))
            except UnrollError as error:
                outcomes.append((error.code, error.message, error.details))
        assert outcomes[0] == outcomes[1]

    def position(self, session_id: str, offset: int | None) -> int | None:
        session = self.other.bound.get(session_id)
        return None if session is None or offset is None else max(0, session.position + offset)

    @rule(session_id=IDS)
    def open(self, session_id: str) -> None:
        self.both(Served.open, session_id, self.now)

    @rule(value=st.integers(1, 3), turns=st.integers(2, 4), unsaid=st.booleans(), answered=st.booleans())
    def frames(self, value: int, turns: int, unsaid: bool, answered: bool) -> None:
        """The same sessions again and again, as most often; the last may not have run."""
        ids = [session.id for session in self.other.scheduler.sessions]
        if self.one.batch or not ids:
            return
        if set(ids) == set(self.ids):
            ids = self.ids
        self.ids = ids
        for turn in range(turns):
            positions = [self.position(i, None if unsaid else 0) for i in ids]
            self.both(Served.frame, ids, positions, [value] * len(ids), self.now)
            if answered or turn < turns - 1:
                self.both(Served.run, self.now)

    @rule(
        ids=st.just([]) | st.lists(IDS, min_size=1, max_size=5),
        data=st.data(),
        offset=st.sampled_from([None, 0, 0, -1, 1]),
    )
    def frame(self, ids: list[str], data: st.DataObject, offset: int | None) -> None:
        """Of any sessions, in any order; or of the last one's."""
        ids = [i for i in ids or self.ids if i in self.other.bound]
        if ids:
            values = [data.draw(st.sampled_from([1, 2, 3, BAD])) for _ in ids]
            odd = data.draw(st.integers(0, 2 * len(ids)))  # which of them is elsewhere, if one is
            positions = [self.position(i, offset if row == odd or offset is None else 0) for row, i in enumerate(ids)]
            self.both(Served.frame, ids, positions, values, self.now)

    @rule(
        session_id=IDS,
        steps=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=2),
        offset=st.sampled_from([None, 0, -1, -1, -2, 1]),
        final=st.booleans(),
    )
    def step(self, session_id: str, steps: list[int], offset: int | None, final: bool) -> None:
        position = self.position(session_id, offset)
        self.both(Served.step, session_id, steps, position, final and offset == 0, self.now)

    @rule(value=st.integers(1, 3))
    def retry(self, value: int) -> None:
        """Of the last step of everyone; or of another in its place."""
        for session_id in self.ids:
            self.both(Served.step, session_id, [value], self.position(session_id, -1), False, self.now)

    @rule(session_id=IDS)
    def look(self, session_id: str) -> None:
        self.both(lambda served: repr(served.scheduler.sessions.find_detached(session_id, self.now)))

    @rule(session_id=IDS)
    def act(self, session_id: str) -> None:
        """Put the session elsewhere, as restoring a snapshot does."""

        def jump(session: Session) -> None:
            session.position += 7
            session.forget_applied()

        def act(served: Served) -> None:
            served.scheduler.submit_action(find(served.scheduler, session_id, self.now), jump, self.now)

        self.both(act)

    @rule(session_id=IDS)
    def close(self, session_id: str) -> None:
        def close(served: Served) -> str:
            session = find(served.scheduler, session_id, self.now)
            served.scheduler.close(session, self.now)
            return repr(session)

        self.both(close)

    @rule(session_id=IDS, depth=st.sampled_from([1, 1, 2]))
    def remember(self, session_id: str, depth: int) -> None:
        def remember(served: Served) -> None:
            if session_id in served.scheduler.sessions:
                served.scheduler.set_retry_depth(served.bound[session_id], depth)

        self.both(remember)

    @rule()
    def cancel(self) -> None:
        if self.one.chunks:
            self.both(lambda served: served.scheduler.cancel(served.chunks.pop(), self.now))

    @rule(seconds=st.sampled_from([0.5, 20.0, 49.0, 60.0, 101.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.both(lambda served: served.scheduler.sessions.expire(self.now))

    @rule()
    def begin_batch(self) -> None:
        """The batch runs while other things happen."""
        if not self.one.batch:
            self.both(Served.begin, self.now)
            for name in ("lens", "sources", "targets", "inputs"):
                one, other = (getattr(served.batch, name, None) for served in (self.one, self.other))
                assert np.array_equal(one, other) if one is not None else other is None

    @rule()
    def end_batch(self) -> None:
        self.both(Served.end, self.now)

    @invariant()
    def alike(self) -> None:
        if hasattr(self, "one"):
            assert self.one.seen() == self.other.seen()
            assert self.one.log == self.other.log
            assert repr(self.one.scheduler) == repr(self.other.scheduler)
            assert self.one.scheduler.counters == self.other.scheduler.counters
            assert self.one.scheduler.estimated_wait() == self.other.scheduler.estimated_wait()
            assert self.other.as_cohorts == 0
            if not self.one.batch:
                self.one.scheduler.check_invariants()
                self.other.scheduler.check_invariants()

    def teardown(self) -> None:
        if hasattr(self, "one"):
            self.end_batch()
            self.both(Served.run, self.now)
            self.alike()


Twins.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
test_twins = Twins.TestCase


# ── one by one ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def served() -> Served:
    """Three sessions that stepped together twice, which makes them a cohort."""
    served = Served(cohorts=True)
    for name in "abc":
        served.open(name, 0)
    for step in (1, 2):
        served.frame([*"abc"], [None] * 3, [step] * 3, 0)
        served.run()
    assert [repr(cohort) for cohort in served.scheduler.sessions.cohorts] == ["<Cohort of 3 idle>"]
    return served


def position(served: Served, name: str) -> int:
    return served.scheduler.sessions.find_detached(name, 0).position


def test_sessions_that_come_together_again_are_one(served):
    served.frame([*"abc"], [2, 2, 2], [3, 4, 5], 0)
    assert repr(served.bound["a"]) == "<Session a in <Cohort of 3 busy>>"
    served.run()
    assert served.as_cohorts == 1
    assert served.log[-1][1] == [3, 3, 3]
    assert [states for states, _ in zip(served.log[-1][2][::2], "abc", strict=True)] == [
        fold([1, 2, last])[2:] for last in (3, 4, 5)
    ]
    for name, last in zip("abc", (3, 4, 5), strict=True):
        again = submit(served.scheduler, name, inputs(last), 0, LATER, position=2)
        assert answer(again) == fold([1, 2, last])[2:]


def test_a_session_in_a_cohort_has_no_record_that_could_be_stale(served):
    session = served.bound["b"]
    for name in ("position", "expected", "last_used", "active"):
        with pytest.raises(RuntimeError, match="no progress of its own"):
            getattr(session, name)
    assert repr(served.scheduler.sessions.detach_from_cohort(session)) == "<Session b idle position=2 expected=2>"
    assert [*served.scheduler.sessions.cohorts] == []


def test_a_step_of_a_cohort_can_be_asked_for_again_while_it_runs_and_after(served):
    s, engine = served.scheduler, served.engine
    served.frame([*"abc"], [2, 2, 2], [3, 4, 5], 0)
    _, batch = s.next_turn(0)
    again = submit(s, "b", inputs(4), 0, LATER, position=2)
    with pytest.raises(PayloadMismatch):
        submit(s, "c", inputs(4), 0, LATER, position=2)
    s.complete(batch, *engine.run(batch), 0)
    assert answer(again) == fold([1, 2, 4])[2:]
    assert answer(submit(s, "c", inputs(5), 0, LATER, position=2)) == fold([1, 2, 5])[2:]
    assert position(served, "b") == position(served, "c") == 3


def test_a_position_that_differs_is_its_rows_alone(served):
    assert served.frame([*"abc"], [2, 3, 2], [3] * 3, 0) == [1]
    run_until_idle(served.scheduler, served.engine)
    assert [position(served, name) for name in "abc"] == [3, 2, 3]
    assert served.as_cohorts == 0


def test_one_that_steps_by_itself_leaves_the_others_where_they_were(served):
    s = served.scheduler
    submit(s, "b", inputs(7), 5, LATER)
    served.run(5)
    assert [(record[0], record[2], record[4]) for record in served.seen()] == [("a", 2, 0), ("c", 2, 0), ("b", 3, 5)]


def test_a_cohort_expires_as_its_sessions_would(served):
    s = served.scheduler
    s.open("d", 50)
    served.frame([*"abc"], [None] * 3, [3] * 3, 60)
    served.run(60)
    s.sessions.expire(155)
    assert [record[0] for record in served.seen()] == [*"abc"]
    assert [*s.sessions.cohorts]
    for name in "abc":
        with pytest.raises(SessionExpired):
            find(s, name, 160)
    assert len(s.sessions) == 0
    assert s.sessions.slots.taken == 0


def test_a_busy_cohort_neither_expires_nor_makes_room(served):
    s = served.scheduler
    s.open("d", 0)
    served.frame([*"abc"], [None] * 3, [3] * 3, 1)
    s.open("e", 2)
    with pytest.raises(SessionEvicted):
        find(s, "d", 2)
    s.sessions.expire(500)
    assert [record[0] for record in served.seen()] == [*"abc"]
    assert [*s.sessions.cohorts]


def test_a_cohort_that_rests_makes_room_by_one(served):
    s = served.scheduler
    s.open("d", 3)
    s.open("e", 4)
    with pytest.raises(SessionEvicted):
        find(s, "a", 4)
    assert [record[0] for record in served.seen()] == [*"bcde"]


def test_a_cohort_is_refused_as_a_whole_and_stays_one(served):
    s = served.scheduler
    s.pace.seconds_per_step = 1.0
    for _ in range(49):
        submit_sequence(s, inputs(1), 0, LATER)
    cohorts, rows = [*s.sessions.cohorts], (np.ones((3, 1), np.int64),)
    with pytest.raises(DeadlineUnreachable):
        s.submit_cohorts(cohorts, None, rows, 0, 5, served.answered)
    submit_sequence(s, inputs(1), 0, LATER)
    with pytest.raises(QueueFull):
        s.submit_cohorts(cohorts, None, rows, 0, LATER, served.answered)
    assert repr(cohorts) == "[<Cohort of 3 idle>]"


def test_a_cohort_that_was_idle_for_too_long_takes_no_step(served):
    assert served.frame([*"abc"], [None] * 3, [3] * 3, 100) == [0, 1, 2]
    assert served.as_cohorts == 0
    with pytest.raises(SessionExpired):
        served.scheduler.sessions.find_detached("a", 100)


def test_a_cohort_takes_one_step_at_a_time(served):
    served.frame([*"abc"], [None] * 3, [3] * 3, 0)
    assert served.frame([*"abc"], [None] * 3, [3] * 3, 0) == [0, 1, 2]
    served.run()
    assert [position(served, name) for name in "abc"] == [3, 3, 3]


def test_a_session_of_which_more_is_to_be_remembered_leaves_its_cohort(served):
    served.scheduler.set_retry_depth(served.bound["a"], 2)
    assert answer(submit(served.scheduler, "a", inputs(2), 0, LATER, position=1)) == fold([1, 2])[1:]
    for _ in range(3):
        served.frame([*"abc"], [None] * 3, [3] * 3, 0)
        served.run()
    assert served.as_cohorts == 0


def test_a_row_that_fails_ends_the_cohort_and_nothing_else(served):
    served.frame([*"abc"], [None] * 3, [3, 3, 3], 0)
    served.run()
    served.frame([*"abc"], [None] * 3, [4, BAD, 4], 0)
    served.run()
    assert served.log[-1][3] == {1: "engine_failed"}
    for name, step in (("a", 4), ("b", 3), ("c", 4)):
        at = position(served, name)
        again = submit(served.scheduler, name, inputs(step), 0, LATER, position=at - 1)
        assert answer(again) == fold([1, 2, 3, 4][:at])[-1:]
    assert [position(served, name) for name in "abc"] == [4, 3, 4]


def test_a_cohort_shares_a_batch():
    """Whatever runs with it, each session's last step can be asked for again."""
    served = Served(cohorts=True)
    for name in "abc":
        served.open(name, 0)
    for step in (1, 2):
        served.frame([*"ab"], [None] * 2, [step] * 2, 0)
        served.run()
    served.frame([*"ab"], [None] * 2, [3] * 2, 0)
    submit(served.scheduler, "c", inputs(7), 0, LATER)
    served.begin(0)
    assert served.batch.lens == [1, 1, 1]
    served.end(0)
    for name, steps in (("a", [1, 2, 3]), ("b", [1, 2, 3]), ("c", [7])):
        again = submit(served.scheduler, name, inputs(steps[-1]), 0, LATER, position=len(steps) - 1)
        assert answer(again) == fold(steps)[-1:]


def test_more_sessions_than_a_batch_takes_are_several_cohorts():
    served = Served(cohorts=True, capacity=8)
    names = [*"abcdefgh"]
    for name in names:
        served.open(name, 0)
    for step in range(4):
        assert served.frame(names, [step] * 8, [step] * 8, 0) == []
        served.run()
    assert [len(cohort.sessions) for cohort in served.scheduler.sessions.cohorts] == [3, 3, 2]
    assert served.as_cohorts == 2
    assert [position(served, name) for name in names] == [4] * 8


def test_one_cohort_that_is_no_more_keeps_the_others_from_stepping():
    served = Served(cohorts=True, capacity=8)
    for name in "abcd":
        served.open(name, 0)
    for _ in range(2):
        served.frame([*"abcd"], [None] * 4, [1] * 4, 0)
        served.run()
    cohorts = [*served.scheduler.sessions.cohorts]
    served.scheduler.sessions.find_detached("d", 0)
    rows = (np.ones((4, 1), np.int64),)
    assert not served.scheduler.submit_cohorts(cohorts, None, rows, 0, LATER, served.answered)
    assert (served.scheduler.in_flight, cohorts[0].formed, cohorts[1].formed) == (0, True, False)


# ── the order of use ─────────────────────────────────────────────────────────────────────────────


class Named(Used):
    def __init__(self, name: str) -> None:
        self.name = name


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "touch", "remove", "replace"]), st.integers(0, 99))))
def test_the_order_of_use_is_that_of_a_list(events: list[tuple[str, int]]) -> None:
    recency: Recency[Named] = Recency()
    order: list[Named] = []
    for n, (event, index) in enumerate(events):
        if event == "add" or not order:
            order.append(Named(f"{n}"))
            recency.add(order[-1])
            continue
        entry = order.pop(index % len(order))
        if event == "touch":
            recency.touch(entry)
            order.append(entry)
        elif event == "remove":
            recency.remove(entry)
        else:
            others = [Named(f"{n}.{i}") for i in range(index % 4)]
            recency.replace(entry, others)
            at = index % (len(order) + 1)
            order[at:at] = others
        assert [*recency] == order
        assert recency.oldest is (order[0] if order else None)
