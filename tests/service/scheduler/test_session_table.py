"""Sessions open, close, expire and are evicted, and no accepted work gets lost."""

import pytest
from fold import (
    LATER,
    FoldEngine,
    answer,
    failure,
    find,
    fold,
    inputs,
    run_until_idle,
    scheduler,
    submit,
    turn,
)

from unroll.service.core.errors import (
    CapacityExhausted,
    SessionEvicted,
    SessionExists,
    SessionExpired,
)
from unroll.service.scheduler.session import Life


def test_closing_fails_waiting_work_and_completes_running_work(s, engine):
    session = s.open("a", 0)
    running = submit(s, "a", inputs(1), 0, LATER)
    waiting = submit(s, "a", inputs(2), 0, LATER)
    _, batch = s.next_turn(0)
    s.close(find(s, "a"), 0)
    assert failure(waiting) == "session_closed"
    assert session.life is Life.LEAVING
    reopened = s.open("a", 0)
    assert reopened.slot != session.slot
    s.complete(batch, *engine.run(batch), 0)
    assert answer(running) == fold([1])
    assert session.life is Life.GONE
    s.check_invariants()


def test_closing_between_pieces_fails_the_chunk(s, engine):
    s.open("a", 0)
    chunk = submit(s, "a", inputs(*range(10)), 0, LATER)
    turn(s, engine)
    s.close(find(s, "a"), 0)
    run_until_idle(s, engine)
    assert failure(chunk) == "session_closed"
    assert s.workspaces.taken == 0


def test_idle_sessions_expire_busy_ones_do_not(s, engine):
    s.open("idle", 0)
    s.open("busy", 0)
    chunk = submit(s, "busy", inputs(1), 0, LATER)
    with pytest.raises(SessionExpired):
        find(s, "idle", 100)
    assert "busy" in s.sessions
    run_until_idle(s, engine, 100)
    assert answer(chunk) == fold([1])
    find(s, "busy", 199)
    with pytest.raises(SessionExpired):
        find(s, "busy", 200)


def test_without_idle_timeout_nothing_expires():
    s = scheduler(idle_timeout=None)
    s.open("a", 0)
    assert find(s, "a", 1e12).id == "a"


def test_least_recently_used_idle_session_is_evicted(s, engine):
    for i, name in enumerate("abcd"):
        s.open(name, i)
    submit(s, "a", inputs(1), 10, LATER)
    run_until_idle(s, engine, 10)
    s.open("e", 11)
    with pytest.raises(SessionEvicted):
        find(s, "b", 11)
    assert [session.id for session in s.sessions] == ["c", "d", "a", "e"]
    assert s.counters.gone == {"session_evicted": 1}


def test_opening_is_refused_when_every_session_has_work(s):
    for name in "abcd":
        s.open(name, 0)
        submit(s, name, inputs(1), 0, LATER)
    with pytest.raises(CapacityExhausted):
        s.open("e", 0)
    s.check_invariants()


def test_a_new_session_in_a_used_row_starts_from_the_initial_state():
    s = scheduler(capacity=1)
    engine = FoldEngine(s.rows)
    for name in "abc":
        s.open(name, 0)
        chunk = submit(s, name, inputs(5), 0, LATER)
        run_until_idle(s, engine)
        assert answer(chunk) == fold([5])


def test_opening_twice_is_refused_reopening_is_not(s):
    s.open("a", 0)
    with pytest.raises(SessionExists):
        s.open("a", 0)
    s.close(find(s, "a"), 0)
    assert s.open("a", 0).position == 0
