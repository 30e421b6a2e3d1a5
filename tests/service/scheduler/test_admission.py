"""Work that cannot meet its deadline is refused on arrival; work that misses it in the queue is dropped."""

import pytest
from fold import (
    LATER,
    answer,
    failure,
    fold,
    inputs,
    run_until_idle,
    submit,
    submit_sequence,
    turn,
)

from unroll.service.core.errors import (
    DeadlineUnreachable,
    QueueFull,
)


def test_the_queue_is_bounded(s):
    for _ in range(50):
        submit_sequence(s, inputs(1), 0, LATER)
    with pytest.raises(QueueFull):
        submit_sequence(s, inputs(1), 0, LATER)
    assert s.in_flight == 50


def test_work_that_cannot_meet_its_deadline_is_refused_on_arrival(s, engine):
    s.pace.seconds_per_step = 1.0
    submit_sequence(s, inputs(1, 2, 3), 0, LATER)
    with pytest.raises(DeadlineUnreachable) as raised:
        submit_sequence(s, inputs(1), 0, 2.9)
    assert raised.value.retry_after == pytest.approx(3)


def test_work_past_its_deadline_is_dropped_without_running(s, engine):
    session = s.open("a", 0)
    late = submit(s, "a", inputs(1), 0, 5)
    after = submit(s, "a", inputs(2), 0, LATER)
    run_until_idle(s, engine, 5)
    assert failure(late) == "deadline_exceeded"
    assert answer(after) == fold([2])
    assert session.position == 1


def test_deadline_does_not_stop_running_work(s, engine):
    chunk = submit_sequence(s, inputs(*range(12)), 0, 5)
    turn(s, engine, 0)
    run_until_idle(s, engine, 9)
    assert answer(chunk) == fold(range(12))


def test_estimated_wait_counts_one_piece_of_a_long_sequence(s):
    s.pace.seconds_per_step = 1.0
    submit_sequence(s, inputs(*range(1000)), 0, LATER)
    assert s.estimated_wait() == 4
    submit_sequence(s, inputs(1), 0, 5)
