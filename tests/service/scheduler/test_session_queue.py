"""The order of a session's work, actions included, and the renumbering of chunks after a failed one."""

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
    SessionClosed,
)
from unroll.service.scheduler.chunk import Chunk
from unroll.service.scheduler.reply import Reply
from unroll.service.scheduler.session import Session


def test_failed_chunk_fails_pinned_followers_and_renumbers_the_rest(s, engine):
    engine.failing = {13}
    session = s.open("a", 0)
    bad = submit(s, "a", inputs(13), 0, LATER)
    pinned = submit(s, "a", inputs(2), 0, LATER, position=1)
    free = submit(s, "a", inputs(3), 0, LATER)
    run_until_idle(s, engine)
    assert failure(bad) == "engine_failed"
    assert failure(pinned) == "position_gap"
    assert answer(free) == fold([3])
    assert session.position == 1


def test_failed_row_does_not_affect_its_neighbours(s, engine):
    engine.failing = {13}
    for name in "ab":
        s.open(name, 0)
    bad, good = submit(s, "a", inputs(13), 0, LATER), submit(s, "b", inputs(1), 0, LATER)
    run_until_idle(s, engine)
    assert (failure(bad), answer(good)) == ("engine_failed", fold([1]))


def test_action_runs_in_order(s, engine):
    s.open("a", 0)
    submit(s, "a", inputs(1), 0, LATER)
    seen = []
    s.submit_action(find(s, "a"), lambda session: seen.append(session.position), 0)
    last = submit(s, "a", inputs(2), 0, LATER)
    run_until_idle(s, engine)
    assert seen == [1]
    assert answer(last) == fold([1, 2])[1:]


def test_action_that_moves_the_session_fails_pinned_followers(s, engine):
    s.open("a", 0)

    def jump(session: Session) -> None:
        session.own_progress.position = 40

    s.submit_action(find(s, "a"), jump, 0)
    pinned = submit(s, "a", inputs(1), 0, LATER, position=0)
    free = submit(s, "a", inputs(1), 0, LATER)
    run_until_idle(s, engine)
    assert failure(pinned) == "position_gap"
    assert isinstance(free, Chunk)
    assert isinstance(free.outcome, Reply)
    assert free.outcome.position == 41


def test_closing_fails_a_waiting_action(s, engine):
    s.open("a", 0)
    submit(s, "a", inputs(1), 0, LATER)
    action = s.submit_action(find(s, "a"), lambda session: session, 0)
    s.close(find(s, "a"), 0)
    run_until_idle(s, engine)
    assert isinstance(action.outcome, SessionClosed)
