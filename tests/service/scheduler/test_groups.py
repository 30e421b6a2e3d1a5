"""The steps of many sessions as one group: accepted, run and answered together, but failing row by row."""

import numpy as np
import pytest
from fold import (
    LATER,
    answer,
    failure,
    find,
    fold,
    inputs,
    run_until_idle,
    submit,
)

from unroll.service.core.errors import (
    PayloadMismatch,
)
from unroll.service.scheduler.chunk import GroupReply
from unroll.service.scheduler.session import Life


def grouped(s, names, rows, positions=None):
    """Return the sessions, the rejected entries, and the list that receives the replies."""
    replies: list[GroupReply] = []
    sessions = [find(s, name, 0) for name in names]
    positions = positions or [session.position for session in sessions]
    left = s.groups.submit(sessions, positions, (np.array(rows),), 0, LATER, replies.append)
    return sessions, left, replies


def test_group_takes_one_step_of_each_session(s, engine):
    for name in "abc":
        s.open(name, 0)
    submit(s, "b", inputs(9), 0, LATER)
    _, left, replies = grouped(s, "abca", [[1], [2], [3], [4]], [0, 0, None, 0])
    assert left == [1, 3]  # b is busy, and a already has a step in the group
    run_until_idle(s, engine)
    (reply,) = replies
    assert (reply.rows, reply.positions.tolist(), reply.errors) == ([0, 2], [1, 1], {})
    assert reply.outputs[0].tolist() == [fold([1]), fold([3])]
    assert grouped(s, "ab", [[5], [6]], [0, 1])[1] == [0]


def test_group_larger_than_a_batch_is_answered_in_parts(s, engine):
    for name in "abcd":
        s.open(name, 0)
    _, left, replies = grouped(s, "abcd", [[1], [2], [3], [4]])
    assert left == []
    run_until_idle(s, engine)
    assert [reply.rows for reply in replies] == [[0, 1, 2], [3]]


def test_a_group_that_runs_with_a_longer_chunk_is_answered_and_kept_without_padding(s, engine):
    for name in "abc":
        s.open(name, 0)
    longer = submit(s, "c", inputs(1, 2, 3, 4), 0, LATER)
    _, _, replies = grouped(s, "ab", [[1, 2, 3], [4, 5, 6]])
    (batch,) = run_until_idle(s, engine)
    assert (batch.rows, answer(longer)) == (3, fold([1, 2, 3, 4]))
    assert replies[0].outputs[0].tolist() == [fold([1, 2, 3]), fold([4, 5, 6])]
    assert all(output.flags.c_contiguous for output in replies[0].outputs), "frames are written from its memory"
    assert answer(submit(s, "b", inputs(4, 5, 6), 0, LATER, position=0)) == fold([4, 5, 6])


def test_a_step_of_a_group_can_be_retried_while_it_runs_and_after(s, engine):
    s.open("a", 0)
    _, _, replies = grouped(s, "a", [[1]])
    _, batch = s.next_turn(0)
    again = submit(s, "a", inputs(1), 0, LATER, position=0)
    with pytest.raises(PayloadMismatch):
        submit(s, "a", inputs(2), 0, LATER, position=0)
    s.complete(batch, *engine.run(batch), 0)
    assert answer(again) == fold([1]) == replies[0].outputs[0][0].tolist()
    assert answer(submit(s, "a", inputs(1), 0, LATER, position=0)) == fold([1])
    with pytest.raises(PayloadMismatch):
        submit(s, "a", inputs(2), 0, LATER, position=0)
    assert s.in_flight == 0


def test_failed_row_fails_only_its_pinned_followers(s, engine):
    engine.failing = {13}
    for name in "ab":
        s.open(name, 0)
    sessions, _, replies = grouped(s, "ab", [[13], [1]])
    pinned = submit(s, "a", inputs(2), 0, LATER, position=1)
    free = submit(s, "a", inputs(3), 0, LATER)
    run_until_idle(s, engine)
    assert {row: error.code for row, error in replies[0].errors.items()} == {0: "engine_failed"}
    assert replies[0].outputs[0][1].tolist() == fold([1])
    assert failure(pinned) == "position_gap"
    assert answer(free) == fold([3])
    assert [session.position for session in sessions] == [1, 1]


def test_session_closed_while_its_group_runs_leaves_once_the_group_completes(s, engine):
    for name in "ab":
        s.open(name, 0)
    sessions, _, replies = grouped(s, "ab", [[1], [2]])
    waiting = submit(s, "a", inputs(2), 0, LATER)
    s.close(find(s, "a"), 0)
    assert failure(waiting) == "session_closed"
    assert sessions[0].life is Life.LEAVING
    run_until_idle(s, engine)
    assert replies[0].outputs[0].tolist() == [fold([1]), fold([2])]
    assert sessions[0].life is Life.GONE
    assert s.sessions.slots.taken == 1


def test_late_group_fails_as_a_whole(s, engine):
    s.open("a", 0)
    replies: list[GroupReply] = []
    s.groups.submit([find(s, "a", 0)], [0], (np.array([[1]]),), 0, 5, replies.append)
    again = submit(s, "a", inputs(1), 0, LATER, position=0)
    run_until_idle(s, engine, now=6)
    assert replies[0].errors[0].code == failure(again) == "deadline_exceeded"
    assert (s.in_flight, find(s, "a", 6).position) == (0, 0)
