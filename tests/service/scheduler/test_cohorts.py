"""Cohorts: sessions that step together share one record until one session needs its own."""

import numpy as np
import pytest
from fold import LATER, answer, find, fold, inputs, run_until_idle, submit, submit_sequence
from served import BAD, Served

from unroll.service.core.errors import (
    DeadlineUnreachable,
    PayloadMismatch,
    QueueFull,
    SessionEvicted,
    SessionExpired,
)


@pytest.fixture
def served() -> Served:
    """Three sessions that stepped together twice and so form a cohort."""
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


def test_repeated_group_becomes_a_cohort(served):
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


def test_a_session_in_a_cohort_has_no_progress_of_its_own(served):
    session = served.bound["b"]
    for name in ("position", "expected", "last_used", "active"):
        with pytest.raises(RuntimeError, match="no progress of its own"):
            getattr(session, name)
    assert repr(served.scheduler.sessions.detach_from_cohort(session)) == "<Session b idle position=2 expected=2>"
    assert [*served.scheduler.sessions.cohorts] == []


def test_a_step_of_a_cohort_can_be_retried_while_it_runs_and_after(served):
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


def test_wrong_position_rejects_only_its_row(served):
    assert served.frame([*"abc"], [2, 3, 2], [3] * 3, 0) == [1]
    run_until_idle(served.scheduler, served.engine)
    assert [position(served, name) for name in "abc"] == [3, 2, 3]
    assert served.as_cohorts == 0


def test_session_that_steps_alone_does_not_change_the_rest_of_its_cohort(served):
    s = served.scheduler
    submit(s, "b", inputs(7), 5, LATER)
    served.run(5)
    assert [(record[0], record[2], record[4]) for record in served.seen()] == [("a", 2, 0), ("c", 2, 0), ("b", 3, 5)]


def test_cohort_expires_when_its_sessions_would(served):
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


def test_busy_cohort_neither_expires_nor_is_evicted(served):
    s = served.scheduler
    s.open("d", 0)
    served.frame([*"abc"], [None] * 3, [3] * 3, 1)
    s.open("e", 2)
    with pytest.raises(SessionEvicted):
        find(s, "d", 2)
    s.sessions.expire(500)
    assert [record[0] for record in served.seen()] == [*"abc"]
    assert [*s.sessions.cohorts]


def test_eviction_takes_one_session_of_an_idle_cohort(served):
    s = served.scheduler
    s.open("d", 3)
    s.open("e", 4)
    with pytest.raises(SessionEvicted):
        find(s, "a", 4)
    assert [record[0] for record in served.seen()] == [*"bcde"]


def test_a_refused_cohort_stays_formed(served):
    s = served.scheduler
    s.pace.seconds_per_step = 1.0
    for _ in range(49):
        submit_sequence(s, inputs(1), 0, LATER)
    cohorts, rows = [*s.sessions.cohorts], (np.ones((3, 1), np.int64),)
    with pytest.raises(DeadlineUnreachable):
        s.groups.submit_cohorts(cohorts, None, rows, 0, 5, served.answered)
    submit_sequence(s, inputs(1), 0, LATER)
    with pytest.raises(QueueFull):
        s.groups.submit_cohorts(cohorts, None, rows, 0, LATER, served.answered)
    assert repr(cohorts) == "[<Cohort of 3 idle>]"


def test_an_expired_cohort_accepts_no_step(served):
    assert served.frame([*"abc"], [None] * 3, [3] * 3, 100) == [0, 1, 2]
    assert served.as_cohorts == 0
    with pytest.raises(SessionExpired):
        served.scheduler.sessions.find_detached("a", 100)


def test_a_cohort_takes_one_step_at_a_time(served):
    served.frame([*"abc"], [None] * 3, [3] * 3, 0)
    assert served.frame([*"abc"], [None] * 3, [3] * 3, 0) == [0, 1, 2]
    served.run()
    assert [position(served, name) for name in "abc"] == [3, 3, 3]


def test_a_session_with_a_larger_retry_depth_leaves_its_cohort(served):
    served.scheduler.set_retry_depth(served.bound["a"], 2)
    assert answer(submit(served.scheduler, "a", inputs(2), 0, LATER, position=1)) == fold([1, 2])[1:]
    for _ in range(3):
        served.frame([*"abc"], [None] * 3, [3] * 3, 0)
        served.run()
    assert served.as_cohorts == 0


def test_a_failed_row_dissolves_the_cohort_and_fails_nothing_else(served):
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
    """Each session can retry its last step even if other work shared the batch."""
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


def test_more_sessions_than_batch_rows_form_several_cohorts():
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


def test_frame_with_a_dissolved_cohort_queues_nothing():
    served = Served(cohorts=True, capacity=8)
    for name in "abcd":
        served.open(name, 0)
    for _ in range(2):
        served.frame([*"abcd"], [None] * 4, [1] * 4, 0)
        served.run()
    cohorts = [*served.scheduler.sessions.cohorts]
    served.scheduler.sessions.find_detached("d", 0)
    rows = (np.ones((4, 1), np.int64),)
    assert not served.scheduler.groups.submit_cohorts(cohorts, None, rows, 0, LATER, served.answered)
    assert (served.scheduler.in_flight, cohorts[0].formed, cohorts[1].formed) == (0, True, False)
