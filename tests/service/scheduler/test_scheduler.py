"""What runs next, what a retry is, and that nothing but a finished chunk changes a session."""

import numpy as np
import pytest
from fold import (
    FoldEngine,
    answer,
    failure,
    find,
    fold,
    inputs,
    names,
    run_until_idle,
    scheduler,
    submit,
    submit_sequence,
    turn,
)

from unroll.service.core.errors import (
    CapacityExhausted,
    DeadlineUnreachable,
    PayloadMismatch,
    PositionGap,
    PositionTooOld,
    QueueFull,
    SessionClosed,
    SessionEvicted,
    SessionExists,
    SessionExpired,
    SessionUnknown,
)
from unroll.service.scheduler.chunk import Chunk, GroupReply
from unroll.service.scheduler.closed_sessions import ClosedSessions
from unroll.service.scheduler.limits import SessionLimits
from unroll.service.scheduler.reply import AppliedChunk, Reply, payload_digest
from unroll.service.scheduler.session import Life, Session

LATER = 1e9


@pytest.fixture
def s():
    return scheduler()


@pytest.fixture
def engine(s):
    return FoldEngine(s.rows)


def test_steps_go_on_from_where_the_session_was(s, engine):
    s.open("a", 0)
    first = submit(s, "a", inputs(1, 2), 0, LATER)
    second = submit(s, "a", inputs(3), 0, LATER)
    run_until_idle(s, engine)
    assert answer(first) + answer(second) == fold([1, 2, 3])
    assert repr(find(s, "a", 0)) == "<Session a idle position=3 expected=3>"


def test_a_session_is_in_a_batch_once_and_sessions_share_it(s, engine):
    for name in "abc":
        s.open(name, 0)
        submit(s, name, inputs(1), 0, LATER)
        submit(s, name, inputs(2), 0, LATER)
    batches = run_until_idle(s, engine)
    assert [names(batch) for batch in batches] == [["a", "b", "c"], ["a", "b", "c"]]


def test_a_sequence_starts_from_the_initial_state_and_leaves_no_trace(s, engine):
    long = submit_sequence(s, inputs(*range(11)), 0, LATER)
    short = submit_sequence(s, inputs(5), 0, LATER)
    run_until_idle(s, engine)
    assert answer(long) == fold(range(11))
    assert answer(short) == fold([5])
    assert s.workspaces.taken == 0


def test_a_long_chunk_takes_turns_with_single_steps(s, engine):
    s.open("long", 0)
    s.open("live", 0)
    long = submit(s, "long", inputs(*range(12)), 0, LATER)
    turn(s, engine)
    live = submit(s, "live", inputs(1), 0, LATER)
    turn(s, engine)
    turn(s, engine)
    assert isinstance(live.outcome, Reply)
    assert long.outcome is None
    run_until_idle(s, engine)
    assert answer(long) == fold(range(12))


def test_a_long_chunk_does_not_touch_its_session_until_its_last_piece(s, engine):
    session = s.open("a", 0)
    submit(s, "a", inputs(1), 0, LATER)
    run_until_idle(s, engine)
    row = engine.rows[session.slot]
    long = submit(s, "a", inputs(*range(12)), 0, LATER)
    turn(s, engine)
    turn(s, engine)
    assert engine.rows[session.slot] == row
    s.cancel(long, 0)
    run_until_idle(s, engine)
    assert failure(long) == "cancelled"
    assert (engine.rows[session.slot], session.position, session.expected) == (row, 1, 1)


def test_rows_of_other_lengths_do_not_share_a_batch_unless_the_model_is_ragged():
    s = scheduler(ragged=False)
    engine = FoldEngine(s.rows)
    for length in (2, 3, 2):
        submit_sequence(s, inputs(*range(length)), 0, LATER)
    assert [batch.lens for batch in run_until_idle(s, engine)] == [[2, 2], [3]]

    s = scheduler(ragged=True)
    for length in (3, 4, 3):
        submit_sequence(s, inputs(*range(length)), 0, LATER)
    assert [batch.lens for batch in run_until_idle(s, FoldEngine(s.rows))] == [[3, 4, 3]]
    assert s.counters.padded_steps == 2


def test_a_model_that_cannot_be_cut_runs_a_sequence_whole():
    s = scheduler(cuttable=False)
    chunk = submit_sequence(s, inputs(*range(30)), 0, LATER)
    batches = run_until_idle(s, FoldEngine(s.rows))
    assert batches[0].lens == [30]
    assert answer(chunk) == fold(range(30))


def test_more_long_chunks_than_workspaces_wait_and_all_come_through(s, engine):
    chunks = [submit_sequence(s, inputs(*range(i, i + 10)), 0, LATER) for i in range(10)]
    run_until_idle(s, engine)
    assert [answer(chunk) for chunk in chunks] == [fold(range(i, i + 10)) for i in range(10)]
    assert s.workspaces.taken == 0


def test_cancelling_starved_chunks_leaves_no_workspace_idle(s, engine):
    chunks = [submit_sequence(s, inputs(*range(10)), 0, LATER) for _ in range(8)]
    turn(s, engine)
    turn(s, engine)
    for chunk in chunks[3:7]:
        s.cancel(chunk, 0)
    run_until_idle(s, engine)
    assert answer(chunks[7]) == fold(range(10))


# ── positions and retries ────────────────────────────────────────────────────────────────────────


def test_a_retry_of_the_last_chunk_gets_the_same_reply(s, engine):
    s.open("a", 0)
    first = submit(s, "a", inputs(1, 2), 0, LATER, position=0)
    run_until_idle(s, engine)
    again = submit(s, "a", inputs(1, 2), 0, LATER, position=0)
    assert answer(again) == answer(first)
    assert again.position == 2
    assert find(s, "a", 0).position == 2
    assert s.counters.replayed == 1


def test_a_retry_of_a_chunk_in_flight_is_that_chunk(s, engine):
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
def test_what_is_no_retry_is_refused_and_changes_nothing(s, engine, position, step, error, expected):
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


def test_when_a_chunk_fails_those_that_insist_on_their_position_fail_and_the_others_move_up(s, engine):
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


def test_a_failing_row_leaves_its_neighbours_alone(s, engine):
    engine.failing = {13}
    for name in "ab":
        s.open(name, 0)
    bad, good = submit(s, "a", inputs(13), 0, LATER), submit(s, "b", inputs(1), 0, LATER)
    run_until_idle(s, engine)
    assert (failure(bad), answer(good)) == ("engine_failed", fold([1]))


def test_a_client_that_pipelines_can_ask_for_as_many_chunks_again(s, engine):
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


# ── groups ───────────────────────────────────────────────────────────────────────────────────────


def grouped(s, names, rows, positions=None):
    """The sessions, what was not taken, and the list that receives the replies."""
    replies: list[GroupReply] = []
    sessions = [find(s, name, 0) for name in names]
    positions = positions or [session.position for session in sessions]
    left = s.submit_group(sessions, positions, (np.array(rows),), 0, LATER, replies.append)
    return sessions, left, replies


def test_a_group_is_one_step_of_each_of_its_sessions(s, engine):
    for name in "abc":
        s.open(name, 0)
    submit(s, "b", inputs(9), 0, LATER)
    _, left, replies = grouped(s, "abca", [[1], [2], [3], [4]], [0, 0, None, 0])
    assert left == [1, 3]  # b is busy, and a has its step already
    run_until_idle(s, engine)
    (reply,) = replies
    assert (reply.rows, reply.positions.tolist(), reply.errors) == ([0, 2], [1, 1], {})
    assert reply.outputs[0].tolist() == [fold([1]), fold([3])]
    assert grouped(s, "ab", [[5], [6]], [0, 1])[1] == [0]


def test_a_group_of_more_rows_than_a_batch_is_answered_in_parts(s, engine):
    for name in "abcd":
        s.open(name, 0)
    _, left, replies = grouped(s, "abcd", [[1], [2], [3], [4]])
    assert left == []
    run_until_idle(s, engine)
    assert [reply.rows for reply in replies] == [[0, 1, 2], [3]]


def test_a_step_of_a_group_can_be_asked_for_again_while_it_runs_and_after(s, engine):
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


def test_a_row_of_a_group_fails_alone_and_what_counted_on_it_too(s, engine):
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


def test_a_session_closed_while_its_group_runs_leaves_when_it_is_done(s, engine):
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


def test_a_group_that_is_late_fails_whole(s, engine):
    s.open("a", 0)
    replies: list[GroupReply] = []
    s.submit_group([find(s, "a", 0)], [0], (np.array([[1]]),), 0, 5, replies.append)
    again = submit(s, "a", inputs(1), 0, LATER, position=0)
    run_until_idle(s, engine, now=6)
    assert replies[0].errors[0].code == failure(again) == "deadline_exceeded"
    assert (s.in_flight, find(s, "a", 6).position) == (0, 0)


# ── START and END ────────────────────────────────────────────────────────────────────────────────


def test_start_opens_and_final_closes_and_their_retries_are_answered(s, engine):
    submit(s, "a", inputs(1), 0, LATER, position=0, start=True)
    run_until_idle(s, engine)
    assert submit(s, "a", inputs(1), 0, LATER, position=0, start=True).position == 1
    submit(s, "a", inputs(2), 0, LATER, position=1, final=True)
    run_until_idle(s, engine)
    assert "a" not in s.sessions
    assert submit(s, "a", inputs(2), 0, LATER, position=1, final=True).position == 2
    with pytest.raises(SessionClosed):
        submit(s, "a", inputs(3), 0, LATER, position=1)
    with pytest.raises(SessionClosed):
        submit(s, "a", inputs(2), 0, LATER)


# ── closing, expiry, eviction ────────────────────────────────────────────────────────────────────


def test_closing_fails_what_waits_and_finishes_what_runs(s, engine):
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


def test_start_opens_a_session_that_expired(s, engine):
    s.open("a", 0)
    chunk = submit(s, "a", inputs(4), 100, LATER, start=True)
    run_until_idle(s, engine, 100)
    assert answer(chunk) == fold([4])


def test_without_idle_timeout_nothing_expires():
    s = scheduler(idle_timeout=None)
    s.open("a", 0)
    assert find(s, "a", 1e12).id == "a"


def test_the_least_recently_used_idle_session_makes_room(s, engine):
    for i, name in enumerate("abcd"):
        s.open(name, i)
    submit(s, "a", inputs(1), 10, LATER)
    run_until_idle(s, engine, 10)
    s.open("e", 11)
    with pytest.raises(SessionEvicted):
        find(s, "b", 11)
    assert [session.id for session in s.sessions] == ["c", "d", "a", "e"]
    assert s.counters.gone == {"session_evicted": 1}


def test_no_room_when_every_session_has_work(s):
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


def test_a_tombstone_is_forgotten_in_the_end(s):
    s.open("a", 0)
    s.close(find(s, "a"), 0)
    with pytest.raises(SessionClosed):
        find(s, "a", 999)
    with pytest.raises(SessionUnknown):
        find(s, "a", 1000)


def test_tombstones_are_bounded(s):
    for i in range(50):
        s.open(f"{i}", 0)
        s.close(find(s, f"{i}"), 0)
    assert repr(s.sessions) == "<SessionTable 0 live, 0 leaving, 20 tombstones>"


def test_opening_twice_is_refused_reopening_is_not(s):
    s.open("a", 0)
    with pytest.raises(SessionExists):
        s.open("a", 0)
    s.close(find(s, "a"), 0)
    assert s.open("a", 0).position == 0


# ── limits ───────────────────────────────────────────────────────────────────────────────────────


def test_the_queue_is_bounded(s):
    for _ in range(50):
        submit_sequence(s, inputs(1), 0, LATER)
    with pytest.raises(QueueFull):
        submit_sequence(s, inputs(1), 0, LATER)
    assert s.in_flight == 50


def test_work_that_cannot_be_in_time_is_refused_at_once(s, engine):
    s.pace.seconds_per_step = 1.0
    submit_sequence(s, inputs(1, 2, 3), 0, LATER)
    with pytest.raises(DeadlineUnreachable) as raised:
        submit_sequence(s, inputs(1), 0, 2.9)
    assert raised.value.retry_after == pytest.approx(3)


def test_work_past_its_deadline_is_dropped_unexecuted(s, engine):
    session = s.open("a", 0)
    late = submit(s, "a", inputs(1), 0, 5)
    after = submit(s, "a", inputs(2), 0, LATER)
    run_until_idle(s, engine, 5)
    assert failure(late) == "deadline_exceeded"
    assert answer(after) == fold([2])
    assert session.position == 1


# ── actions ──────────────────────────────────────────────────────────────────────────────────────


def test_an_action_runs_in_its_turn(s, engine):
    s.open("a", 0)
    submit(s, "a", inputs(1), 0, LATER)
    seen = []
    s.submit_action(find(s, "a"), lambda session: seen.append(session.position), 0)
    last = submit(s, "a", inputs(2), 0, LATER)
    run_until_idle(s, engine)
    assert seen == [1]
    assert answer(last) == fold([1, 2])[1:]


def test_an_action_that_moves_the_session_fails_what_insisted_on_the_old_position(s, engine):
    s.open("a", 0)

    def jump(session: Session) -> None:
        session.position = 40

    s.submit_action(find(s, "a"), jump, 0)
    pinned = submit(s, "a", inputs(1), 0, LATER, position=0)
    free = submit(s, "a", inputs(1), 0, LATER)
    run_until_idle(s, engine)
    assert failure(pinned) == "position_gap"
    assert isinstance(free, Chunk)
    assert isinstance(free.outcome, Reply)
    assert free.outcome.position == 41


def test_closing_fails_an_action_that_waits(s, engine):
    s.open("a", 0)
    submit(s, "a", inputs(1), 0, LATER)
    action = s.submit_action(find(s, "a"), lambda session: session, 0)
    s.close(find(s, "a"), 0)
    run_until_idle(s, engine)
    assert isinstance(action.outcome, SessionClosed)


def test_a_late_duplicate_of_the_request_that_opened_a_session_opens_no_other(s, engine):
    submit(s, "a", inputs(1), 0, LATER, position=0, start=True)
    submit(s, "a", inputs(2), 0, LATER, position=1, final=True)
    run_until_idle(s, engine)
    with pytest.raises(SessionClosed):
        submit(s, "a", inputs(1), 0, LATER, position=0, start=True)
    another = submit(s, "a", inputs(5), 0, LATER, position=0, start=True)
    run_until_idle(s, engine)
    assert answer(another) == fold([5])


def test_a_start_that_fails_leaves_no_session_and_may_be_tried_again(s, engine):
    late = submit(s, "a", inputs(1), 0, 5, position=0, start=True)
    behind = submit(s, "a", inputs(2), 0, LATER)
    run_until_idle(s, engine, 5)
    assert (failure(late), failure(behind)) == ("deadline_exceeded", "session_closed")
    assert "a" not in s.sessions
    again = submit(s, "a", inputs(1), 6, LATER, position=0, start=True)
    run_until_idle(s, engine, 6)
    assert answer(again) == fold([1])


def test_a_starved_chunk_that_is_late_wakes_the_next(s):
    s = scheduler(max_batch=1)
    engine = FoldEngine(s.rows)
    chunks = [submit_sequence(s, inputs(*range(10)), 0, deadline) for deadline in (LATER, 5, LATER, LATER)]
    turn(s, engine, 0)
    turn(s, engine, 1)
    assert chunks[0].outcome is None
    run_until_idle(s, engine, 6)
    assert failure(chunks[1]) == "deadline_exceeded"
    assert [answer(chunk) for chunk in (chunks[0], *chunks[2:])] == [fold(range(10))] * 3


def test_a_deadline_does_not_stop_what_has_begun(s, engine):
    chunk = submit_sequence(s, inputs(*range(12)), 0, 5)
    turn(s, engine, 0)
    run_until_idle(s, engine, 9)
    assert answer(chunk) == fold(range(12))


def test_a_step_need_not_wait_for_all_of_a_long_sequence(s):
    s.pace.seconds_per_step = 1.0
    submit_sequence(s, inputs(*range(1000)), 0, LATER)
    assert s.estimated_wait() == 4
    submit_sequence(s, inputs(1), 0, 5)


def test_a_repeat_that_ends_the_session_is_no_retry_of_one_that_did_not(s, engine):
    submit(s, "a", inputs(1), 0, LATER, position=0, start=True)
    run_until_idle(s, engine)
    with pytest.raises(PayloadMismatch):
        submit(s, "a", inputs(1), 0, LATER, position=0, final=True)
    assert "a" in s.sessions


def test_after_a_while_the_same_request_opens_a_new_session(s, engine):
    submit(s, "a", inputs(1), 0, LATER, position=0, start=True)
    submit(s, "a", inputs(2), 0, LATER, position=1, final=True)
    run_until_idle(s, engine)
    again = submit(s, "a", inputs(1), 60, LATER, position=0, start=True)
    run_until_idle(s, engine, 60)
    assert answer(again) == fold([1])


def test_the_replies_of_closing_chunks_are_bounded_in_bytes():
    closed = ClosedSessions(SessionLimits(closing_reply_bytes=100))

    def known() -> str:
        return "".join(name for name in "abcd" if closed.reply_to(name, 0, inputs(1), 0) is not None)

    last = AppliedChunk(0, payload_digest(inputs(1)), Reply((np.zeros(5),), 5))
    for name in "abc":
        closed.add(name, SessionClosed, 0, b"", last)
    assert known() == "bc"
    closed.forget("b")
    closed.add("d", SessionClosed, 0, b"", last)
    assert known() == "cd"
