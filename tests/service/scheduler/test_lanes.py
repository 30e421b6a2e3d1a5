"""The length of the pieces of long work, and the absence of starvation."""

import numpy as np
import pytest
from fold import FoldEngine, answer, fold, inputs, scheduler, submit, submit_sequence

from unroll.service.scheduler.admission import Pace
from unroll.service.scheduler.chunk import Chunk, Group
from unroll.service.scheduler.lanes import Lanes
from unroll.service.scheduler.limits import SchedulerLimits
from unroll.service.scheduler.reply import Reply

LIMITS = SchedulerLimits(max_batch=256, max_batch_steps=2048, piece_steps=64)
STEP = 1e-6  # seconds per row and step


def pace(*, at: float = 0.0) -> Pace:
    """A pace that has observed one piece of long work."""
    pace = Pace(LIMITS)
    pace.observe(256, 256 * STEP, at, long=True)
    return pace


def test_piece_has_the_configured_length_before_any_measurement() -> None:
    assert Pace(LIMITS).piece(4, 0.0) == 64


def test_piece_without_other_work_takes_five_milliseconds_or_fills_a_batch() -> None:
    assert pace().piece(8, 1.0) == 2048 // 8
    slow = Pace(LIMITS)
    slow.observe(10, 10 * 1e-3, 0.0, long=True)
    assert slow.piece(1, 1.0) == 5


def test_piece_takes_half_the_time_since_the_previous_one_while_other_work_runs() -> None:
    for since, expected in ((0.002, 250), (0.0001, 62), (5.0, 512)):
        shared = pace()
        shared.observe(64, 0.0005, since / 2, long=False)
        assert shared.piece(4, since) == expected


def test_pieces_grow_with_the_absence_of_other_work() -> None:
    shared = pace()
    shared.observe(64, 0.0005, 0.001, long=False)
    now, steps = 0.001, []
    while not steps or steps[-1] < 512:
        steps.append(shared.piece(4, now))
        now += 4 * steps[-1] * STEP
        shared.observe(4 * steps[-1], 4 * steps[-1] * STEP, now, long=True)
    assert steps == [125, 125, 250, 500, 512]


def test_idle_time_does_not_count() -> None:
    rested = pace()
    rested.observe(64, 0.0005, 0.001, long=False)
    rested.rest()
    assert rested.piece(8, 60.0) == 256


def test_long_work_and_single_steps_take_turns() -> None:
    s = scheduler(max_batch=3, max_batch_steps=12, piece_steps=4)
    engine = FoldEngine(s.rows)
    s.open("live", 0)
    long = [submit_sequence(s, inputs(*range(40)), 0, 1e9) for _ in range(2)]
    live, now, kinds = 0, 0.0, []
    while long[0].outcome is None or long[1].outcome is None:
        submit(s, "live", inputs(live), now, 1e9)
        live += 1
        for _ in range(2):
            now += 0.001
            _, batch = s.next_turn(now)
            kinds.append(max(batch.lens) == 1)
            s.complete(batch, *engine.run(batch), now, 1e-6 * batch.steps)
    assert [answer(chunk) for chunk in long] == [fold(range(40))] * 2
    assert all(isinstance(chunk.outcome, Reply) for chunk in long)
    assert kinds == [True, False] * (len(kinds) // 2) or kinds == [False, True] * (len(kinds) // 2)


def test_pieces_end_with_the_shortest_row_to_avoid_padding() -> None:
    s = scheduler(ragged=True, piece_steps=4, max_batch_steps=100)
    engine = FoldEngine(s.rows)
    for length in (5, 7, 9):
        submit_sequence(s, inputs(*range(length)), 0, 1e9)
    lens = []
    while not s.idle:
        _, batch = s.next_turn(0)
        lens.append(batch.lens)
        s.complete(batch, *engine.run(batch), 0, 1e-9 * batch.steps)
    assert lens == [[4, 4, 4], [1, 1, 1], [2, 2], [2]]
    assert s.counters.padded_steps == 0


def test_lane_of_long_chunks_rejects_groups() -> None:
    s = scheduler(piece_steps=4)
    session = s.open("a", 0)
    rejected = s.groups.submit([session], [0], (np.zeros((1, 5), np.int64),), 0, 1e9, lambda reply: None)
    assert rejected == [0], "long groups are rejected"
    lanes = Lanes(s.traits, s.limits, s.workspaces, s.pace, lambda work, now: False, lambda steps, now: [])
    lanes.put(Group([session], [0], (np.zeros((1, 5), np.int64),), 5, 1e9, lambda reply: None), 0)
    with pytest.raises(AssertionError, match="groups are short"):
        lanes.take(0)


def test_chunks_waiting_for_a_workspace_are_not_all_checked_before_each_batch() -> None:
    s, looked, count = scheduler(max_batch=3), list[Chunk | Group](), 200

    def look(work: Chunk | Group, now: float) -> bool:
        looked.append(work)
        return False

    lanes = Lanes(s.traits, s.limits, s.workspaces, s.pace, look, lambda steps, now: [])
    for _ in range(count):
        lanes.put(Chunk(inputs(*range(50))), 0.0)
    for number in range(20):
        batch = lanes.take(number / 1000)
        assert len(batch.work) == 3
        for work in batch.work:
            lanes.put(work, number / 1000)  # more pieces remain
    assert len(looked) < 3 * count
    lanes.take(1.0)
    assert len({*looked[-count:]}) == count, "now and then they are, so that none stays beyond its deadline"
