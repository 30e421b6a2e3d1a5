"""Retries and their replies; a chunk at a wrong position that is not a retry changes nothing."""

import pytest
from fold import (
    LATER,
    FoldEngine,
    answer,
    find,
    fold,
    inputs,
    run_until_idle,
    scheduler,
    submit,
)

from unroll.service.core.errors import (
    PayloadMismatch,
    PositionGap,
    PositionTooOld,
)


def test_a_retry_of_the_last_chunk_gets_the_same_reply(s, engine):
    s.open("a", 0)
    first = submit(s, "a", inputs(1, 2), 0, LATER, position=0)
    run_until_idle(s, engine)
    again = submit(s, "a", inputs(1, 2), 0, LATER, position=0)
    assert answer(again) == answer(first)
    assert again.position == 2
    assert find(s, "a", 0).position == 2
    assert s.counters.replayed == 1


def test_retry_of_a_chunk_in_flight_joins_it(s, engine):
    s.open("a", 0)
    first = submit(s, "a", inputs(1), 0, LATER)
    second = submit(s, "a", inputs(2), 0, LATER, position=1)
    assert submit(s, "a", inputs(1), 0, LATER, position=0) is first
    assert submit(s, "a", inputs(2), 0, LATER, position=1) is second
    with pytest.raises(PayloadMismatch):
        submit(s, "a", inputs(9), 0, LATER, position=1)


@pytest.mark.parametrize(
    ("position", "step", "error", "expected"),
    [(2, 3, PayloadMismatch, 3), (0, 1, PositionTooOld, 3), (1, 2, PositionTooOld, 3), (4, 5, PositionGap, 3)],
)
def test_chunk_at_a_wrong_position_is_refused_and_changes_nothing(s, engine, position, step, error, expected):
    session = s.open("a", 0)
    submit(s, "a", inputs(1), 0, LATER)
    submit(s, "a", inputs(1), 0, LATER)
    submit(s, "a", inputs(1), 0, LATER)
    run_until_idle(s, engine)
    before = (repr(session), engine.rows[session.slot], s.in_flight)
    with pytest.raises(error) as raised:
        submit(s, "a", inputs(step), 0, LATER, position=position)
    assert raised.value.details["expected"] == expected
    assert (repr(session), engine.rows[session.slot], s.in_flight) == before


def test_a_session_of_depth_n_can_retry_its_last_n_chunks(s, engine):
    session = s.open("a", 0)
    submit(s, "a", inputs(0), 0, LATER)
    run_until_idle(s, engine)
    s.set_retry_depth(session, 3)
    for step in (1, 2):
        submit(s, "a", inputs(step), 0, LATER)
        run_until_idle(s, engine)
    for step in (0, 1, 2):
        again = submit(s, "a", inputs(step), 0, LATER, position=step)
        assert answer(again) == fold([0, 1, 2])[step : step + 1]
    submit(s, "a", inputs(3), 0, LATER)
    run_until_idle(s, engine)
    with pytest.raises(PositionTooOld):
        submit(s, "a", inputs(0), 0, LATER, position=0)
    s.set_retry_depth(session, 1)
    assert answer(submit(s, "a", inputs(3), 0, LATER, position=3)) == fold([0, 1, 2, 3])[3:]
    with pytest.raises(PositionTooOld):
        submit(s, "a", inputs(2), 0, LATER, position=2)


def test_closing_chunk_is_not_a_retry_of_a_chunk_that_did_not_close(s, engine):
    submit(s, "a", inputs(1), 0, LATER, position=0, start=True)
    run_until_idle(s, engine)
    with pytest.raises(PayloadMismatch):
        submit(s, "a", inputs(1), 0, LATER, position=0, final=True)
    assert "a" in s.sessions


#: Bytes of the reply to a chunk of N steps: one number per step, plus the final state.
def reply_bytes(steps):
    return 8 * (steps + 1)


def test_a_reply_too_large_to_keep_is_marked_and_its_retry_is_refused():
    s = scheduler(reply_bytes=64 * reply_bytes(4), piece_steps=10)
    engine = FoldEngine(s.rows)
    s.open("a", 0)
    for start, steps, kept in ((0, 4, True), (4, 5, False), (9, 4, True)):
        chunk = submit(s, "a", inputs(*range(steps)), 0, LATER, position=start)
        run_until_idle(s, engine)
        assert chunk.outcome.kept == kept
        assert s.replay.kept_bytes == (reply_bytes(steps) if kept else 0)
        if kept:
            assert answer(submit(s, "a", inputs(*range(steps)), 0, LATER, position=start)) == answer(chunk)
        else:
            with pytest.raises(PositionTooOld, match="too large to keep") as refused:
                submit(s, "a", inputs(*range(steps)), 0, LATER, position=start)
            assert refused.value.details["expected"] == start + steps
            with pytest.raises(PayloadMismatch):
                submit(s, "a", inputs(*range(1, steps + 1)), 0, LATER, position=start)


@pytest.mark.parametrize("end", ["close", "expire", "step"])
def test_replies_of_all_sessions_share_a_limit_and_free_it_when_dropped(end):
    s = scheduler(capacity=100, reply_bytes=64 * reply_bytes(2))
    engine = FoldEngine(s.rows)
    for i in range(70):
        s.open(str(i), 0)
        chunk = submit(s, str(i), inputs(1, 2), 0, LATER)
        run_until_idle(s, engine)
        assert chunk.outcome.kept == (i < 64)
    assert s.replay.kept_bytes == 64 * reply_bytes(2)
    if end == "close":
        for i in range(70):
            s.close(find(s, str(i)), 0)
    elif end == "expire":
        s.next_turn(1000)
    else:
        for i in range(70):
            submit(s, str(i), inputs(3), 0, LATER)
            run_until_idle(s, engine)
    assert s.replay.kept_bytes == 0
