"""Steps that arrive one by one run as groups; until then they can be cancelled."""

from dataclasses import replace

import numpy as np
import pytest
from fold import (
    INVALID,
    LATER,
    Joiner,
    answer,
    failure,
    find,
    fold,
    inputs,
    join,
    run_until_idle,
    scheduler,
    submit,
    submit_sequence,
    turn,
)

from unroll.service.core.errors import PayloadMismatch, QueueFull, SessionClosed, SessionContended, SessionExpired
from unroll.service.core.session_ids import owned
from unroll.service.scheduler.chunk import Chunk, Opening
from unroll.service.scheduler.limits import SchedulerLimits, SessionLimits
from unroll.service.scheduler.scheduler import Scheduler
from unroll.service.scheduler.session import Durable
from unroll.service.store.interface import refused_commit
from unroll.service.store.record import STORED, Kept, Origin, Record


@pytest.fixture
def settled(s: Scheduler, engine) -> Scheduler:
    """A scheduler with sessions a, b, c and d, each after one step."""
    for name in "abcd":
        s.open(name, 0)
        submit(s, name, inputs(1), 0, LATER)
    run_until_idle(s, engine)
    return s


class Log(dict):
    """Replies by session."""

    def of(self, name: str) -> Joiner:
        return Joiner(lambda outcome: self.update({name: getattr(outcome, "code", outcome)}))


def joined(s: Scheduler, names: str, log: Log, step: int = 2) -> list[bool]:
    return [join(s, find(s, name), step, log.of(name)) for name in names]


def test_joined_steps_run_in_one_batch_and_each_gets_its_reply(settled, engine):
    log = Log()
    assert joined(settled, "abc", log) == [True] * 3
    assert turn(settled, engine).rows == 3
    assert log == dict.fromkeys("abc", fold([1, 2])[-1:])
    assert settled.idle
    settled.check_invariants()


def test_steps_beyond_a_batch_form_further_groups_in_order_of_arrival(engine):
    s, log, ids = scheduler(capacity=8), Log(), "zyxwvuts"  # a batch holds three rows
    engine.rows += [-1] * 8
    for name in ids:
        assert join(s, s.open(name, 0), 1, log.of(name))
    groups = []
    while not s.idle:
        batch = turn(s, engine)
        s.check_invariants()
        (group,) = batch.work
        groups.append("".join(session.id for session in group.sessions))
    assert groups == ["zyx", "wvu", "ts"]
    assert log == dict.fromkeys(ids, fold([1]))


def test_tenant_with_many_steps_leaves_room_for_one_with_a_single_step(engine):
    s, log = scheduler(capacity=30, max_batch=4), Log()
    engine.rows += [-1] * 30
    flood = [s.open(owned("flood", str(i)), 0) for i in range(20)]
    calm = s.open(owned("calm", "0"), 0)
    assert all(join(s, session, 1, log.of(session.id)) for session in flood)
    turn(s, engine)
    for step in (1, 2):  # one of the four rows of each batch is as much as the calm tenant wants
        assert join(s, calm, step, log.of("calm"))
        assert turn(s, engine).rows == 4
        assert log.pop("calm") == fold([1, 2])[step - 1 : step]
    run_until_idle(s, engine)
    assert log == {session.id: fold([1]) for session in flood}


def test_groups_and_chunks_share_batches_with_more_steps_than_fit(settled, engine):
    log, replies, more = Log(), [], []
    s = scheduler(capacity=8)
    engine.rows += [-1] * 8
    sessions = [s.open(name, 0) for name in "abcdefgh"]
    assert s.groups.submit(sessions[:2], [None] * 2, (np.array([[1], [1]]),), 0, LATER, replies.append) == []
    alone = submit(s, "c", inputs(1), 0, LATER)
    for session in sessions[3:]:
        assert join(s, session, 1, log.of(session.id))
    more += run_until_idle(s, engine)
    assert [batch.rows for batch in more] == [3, 3, 2]
    assert replies[0].outputs[0].tolist() == [fold([1])] * 2
    assert [answer(alone), *log.values()] == [fold([1])] * 6


def test_step_joins_only_at_the_position_of_an_idle_open_session(settled, engine):
    log = Log()
    a, b = find(settled, "a"), find(settled, "b")
    assert not join(settled, a, 2, log.of("a"), position=0)
    assert not join(settled, a, 2, log.of("a"), position=2)
    assert join(settled, a, 2, log.of("a"), position=1)
    assert not join(settled, a, 3, log.of("a"))
    settled.close(b, 0)
    assert not join(settled, b, 2, log.of("b"))
    assert join(settled, settled.open("e", 0), 2, log.of("e"))
    run_until_idle(settled, engine)


def test_steps_join_while_chunks_of_other_lengths_wait(settled, engine):
    log, chunk = Log(), submit(settled, "a", inputs(2, 3), 0, LATER)
    assert joined(settled, "bc", log) == [True, True]
    run_until_idle(settled, engine)
    assert answer(chunk) == fold([1, 2, 3])[1:]
    assert log == dict.fromkeys("bc", fold([1, 2])[-1:])


def test_steps_join_while_a_long_chunk_runs_in_separate_batches(settled, engine):
    log, long = Log(), submit(settled, "a", inputs(*range(2, 12)), 0, LATER)  # a piece holds four steps
    assert joined(settled, "bc", log) == [True, True]
    assert turn(settled, engine).rows == 1
    assert not log
    assert turn(settled, engine).rows == 2
    assert log == dict.fromkeys("bc", fold([1, 2])[-1:])
    run_until_idle(settled, engine)
    assert answer(long) == fold(range(1, 12))[1:]
    settled.check_invariants()


def test_cancelled_step_has_no_effect(settled, engine):
    log = Log()
    listeners = {name: log.of(name) for name in "abc"}
    for name, listener in listeners.items():
        join(settled, find(settled, name), 2, listener)
    behind = submit(settled, "b", inputs(3), 0, LATER)
    pinned = submit(settled, "b", inputs(3), 0, LATER, position=3)
    settled.joined.cancel(find(settled, "b"), listeners["b"], 0)
    assert failure(pinned) == "position_gap"
    run_until_idle(settled, engine)
    assert log == dict.fromkeys("ac", fold([1, 2])[-1:])
    assert answer(behind) == fold([1, 3])[-1:]
    assert settled.counters.failed["cancelled"] == 1


def test_joined_durable_steps_are_applied_as_the_store_commits_each(settled, engine):
    """Of three steps, the second fails in the engine and the store refuses the third because its state is stale."""
    log, sessions = Log(), [find(settled, name) for name in "abc"]
    for session in sessions:
        session.durable = Durable(Origin("ab" * 32, STORED, b"born" * 4).to_bytes(), b"token")
    assert joined(settled, "a", log, 2) + joined(settled, "b", log, 13) + joined(settled, "c", log, 2) == [True] * 3
    engine.failing = {13}
    _, batch = settled.next_turn(0)
    outputs, failed = engine.run(batch)
    pending = settled.complete(batch, outputs, failed, 0)
    assert (log, [session.position for session in sessions]) == ({}, [1, 1, 1])
    behind = submit(settled, "c", inputs(3), 0, LATER)
    commits = settled.commits.of("model", pending, lambda slots: np.float32(slots)[:, None])
    records = {commit.key[1]: Record.unpack(commit.content) for commit in commits}
    assert {name: (record.position, record.row) for name, record in records.items()} == {
        session.id: (2, np.float32(session.slot).tobytes()) for session in (sessions[0], sessions[2])
    }
    settled.commits.complete(pending, commits, [None, SessionContended("moved on", 0.1)], 3, 0, lambda slot, row: None)
    assert log == {"a": fold([1, 2])[-1:], "b": "engine_failed", "c": "session_contended"}
    assert failure(behind) == "session_contended"
    assert [session.position for session in sessions] == [2, 1, 1]
    assert joined(settled, "abc", log) == [True, True, False]  # the copy is stale
    settled.close(sessions[0], 0)
    settled.close(sessions[1], 0)
    settled.next_turn(0)
    settled.check_invariants()


def test_steps_of_durable_and_memory_sessions_run_in_one_batch(settled, engine):
    log, durable = Log(), find(settled, "b")
    durable.durable = Durable(Origin("ab" * 32, STORED, b"born" * 4).to_bytes(), b"token")
    assert joined(settled, "abc", log) == [True] * 3
    _, batch = settled.next_turn(0)
    pending = settled.complete(batch, *engine.run(batch), 0)
    assert log == dict.fromkeys("ac", fold([1, 2])[-1:])
    commits = settled.commits.of("model", pending, lambda slots: np.float32(slots)[:, None])
    settled.commits.complete(pending, commits, [None], 3, 0, lambda slot, row: None)
    assert log["b"] == fold([1, 2])[-1:]
    settled.check_invariants()


def test_refused_step_joins_again_with_the_record_from_the_refusal(settled, engine):
    """Only `a` joins again: the record of `b` is of another session, and a call waits for a lookup of `c`."""
    log, sessions = Log(), [find(settled, name) for name in "abc"]
    origin = Origin("ab" * 32, STORED, b"born" * 4)
    for session in sessions:
        session.origin, session.durable = origin, Durable(origin.to_bytes(), b"token")

    def again(name: str) -> Joiner:
        def take(outcome: object) -> None:
            if not isinstance(outcome, SessionContended) or not join(settled, find(settled, name), 2, joiner):
                log[name] = getattr(outcome, "code", outcome)

        joiner = Joiner(take)
        return joiner

    def write(slot: int, row: np.ndarray) -> None:
        engine.rows[slot] = int(row[0])

    assert [join(settled, session, 2, again(session.id)) for session in sessions] == [True] * 3
    behind = submit(settled, "a", inputs(3), 0, LATER)
    _, batch = settled.next_turn(0)
    pending = settled.complete(batch, *engine.run(batch), 0)
    commits = settled.commits.of("model", pending, lambda slots: np.float32(slots)[:, None])
    sessions[2].durable.stale = True
    kept = Kept(4, 1, b"digest" + bytes(10), np.int64([5, 5]).tobytes())
    records = [Record(each, 5, np.float32([9]).tobytes(), (kept,), token=b"new") for each in (origin,) * 3]
    records[1] = replace(records[1], origin=replace(origin, born=b"anew" * 4))
    refusals = [refused_commit(commit.key, record) for commit, record in zip(commits, records, strict=True)]
    settled.commits.complete(pending, commits, refusals, 3, 0, write)
    assert log == {"b": "session_contended", "c": "session_contended"}
    assert failure(behind) == "session_contended"
    assert [session.durable.stale for session in sessions] == [False, True, True]
    assert (sessions[0].durable.token, sessions[0].position, sessions[0].expected) == (b"new", 5, 6)
    _, batch = settled.next_turn(0)
    pending = settled.complete(batch, *engine.run(batch), 0)
    (commit,) = settled.commits.of("model", pending, lambda slots: np.float32(slots)[:, None])
    assert (commit.expected, Record.unpack(commit.content).position) == (b"new", 6)
    settled.commits.complete(pending, [commit], [None], 1, 0, write)
    assert log["a"] == fold([2], 9)
    settled.check_invariants()


def test_steps_join_behind_more_work_than_one_batch(settled, engine):
    log = Log()
    alone = [submit(settled, name, inputs(2), 0, LATER) for name in "abcd"]
    assert turn(settled, engine).rows == 3  # one step remains in the queue
    assert joined(settled, "ab", log, 3) == [True, True]
    assert turn(settled, engine).rows == 3
    assert [answer(chunk) for chunk in alone] == [fold([1, 2])[-1:]] * 4
    assert log == dict.fromkeys("ab", fold([1, 2, 3])[-1:])
    settled.check_invariants()


def test_step_with_a_waiting_retry_is_not_cancelled(settled, engine):
    log = Log()
    listener = log.of("b")
    joined(settled, "a", log)
    join(settled, find(settled, "b"), 2, listener)
    again = submit(settled, "b", inputs(2), 0, LATER, position=1)
    with pytest.raises(PayloadMismatch):
        submit(settled, "b", inputs(3), 0, LATER, position=1)
    settled.joined.cancel(find(settled, "b"), listener, 0)
    run_until_idle(settled, engine)
    assert answer(again) == fold([1, 2])[-1:]
    assert find(settled, "b").position == 2


def test_invalid_step_fails_alone_and_renumbers_its_followers(settled, engine):
    log = Log()
    joined(settled, "b", log, INVALID)
    joined(settled, "ac", log)
    again = submit(settled, "c", inputs(2), 0, LATER, position=1)
    behind = submit(settled, "b", inputs(3), 0, LATER)
    run_until_idle(settled, engine)
    assert log == {"b": "non_finite_input"} | dict.fromkeys("ac", fold([1, 2])[-1:])
    assert answer(behind) == fold([1, 3])[-1:]
    assert answer(again) == fold([1, 2])[-1:]


def test_group_of_only_invalid_steps_runs_nothing(settled, engine):
    log = Log()
    joined(settled, "ab", log, INVALID)
    assert turn(settled, engine).rows == 0
    assert log == dict.fromkeys("ab", "non_finite_input")
    assert settled.idle
    settled.check_invariants()


def test_closing_a_session_fails_its_waiting_step_the_retry_and_its_followers(settled, engine):
    log = Log()
    joined(settled, "ab", log)
    again = submit(settled, "a", inputs(2), 0, LATER, position=1)
    behind = submit(settled, "a", inputs(3), 0, LATER, position=2)
    settled.close(find(settled, "a"), 0)
    assert {log["a"], failure(again), failure(behind)} == {"session_closed"}
    run_until_idle(settled, engine)
    assert log["b"] == fold([1, 2])[-1:]


def test_late_steps_fail(settled, engine):
    log = Log()
    joined(settled, "ab", log)
    run_until_idle(settled, engine, now=51)
    assert log == dict.fromkeys("ab", "deadline_exceeded")
    assert find(settled, "a", 51).position == 1


def test_the_first_step_of_a_session_joins_and_its_retry_is_answered(s, engine):
    log, session = Log(), s.open("new", 0)
    assert join(s, session, 1, log.of("new"), position=0)
    run_until_idle(s, engine)
    assert log == {"new": fold([1])}
    assert answer(submit(s, "new", inputs(1), 0, LATER, position=0)) == fold([1])
    assert join(s, session, 2, log.of("new"), position=1)
    run_until_idle(s, engine)
    assert log == {"new": fold([1, 2])[-1:]}


def start(
    s: Scheduler, name: str, log: Log, step: int = 1, position: int | None = None, listener: Joiner | None = None
):
    """Join the step that opens a session. Returns the session."""
    chunk = Chunk(inputs(step), None, position, opening=Opening(name))
    assert s.join(chunk, 0, 50, listener or log.of(name))
    return chunk.session


def end(s: Scheduler, name: str, log: Log, step: int = 2, position: int | None = None) -> bool:
    return s.join(Chunk(inputs(step), find(s, name), position, final=True), 0, 50, log.of(name))


def test_steps_that_open_or_end_their_session_join(settled, engine):
    log = Log()
    settled.close(find(settled, "d"), 0)
    assert joined(settled, "a", log) == [True]
    assert end(settled, "b", log)
    opened = start(settled, "new", log)
    assert turn(settled, engine).rows == 3
    assert log == dict.fromkeys("ab", fold([1, 2])[-1:]) | {"new": fold([1])}
    assert (opened.position, find(settled, "new"), find(settled, "a").position) == (1, opened, 2)
    with pytest.raises(SessionClosed):
        find(settled, "b")
    assert start(settled, "b", log).position == 0
    run_until_idle(settled, engine)
    assert log["b"] == fold([1])


@pytest.mark.parametrize("how", ["engine", "cancel", "late"])
def test_session_whose_first_step_fails_is_closed_and_may_be_opened_again(s, engine, how):
    log, listener = Log(), Log().of("new")
    session = start(s, "new", log, 13, 0, listener if how == "cancel" else None)
    behind = submit(s, "new", inputs(3), 0, LATER)
    if how == "cancel":
        s.joined.cancel(session, listener, 0)
    engine.failing = {13}
    run_until_idle(s, engine, now=51 if how == "late" else 0)
    assert failure(behind) == "session_closed"
    assert "new" not in s.sessions
    engine.failing = set()
    assert start(s, "new", log, 13, 0).position == 0  # not refused as a late duplicate
    run_until_idle(s, engine)
    assert log == {"new": fold([13])}


def test_session_whose_last_step_fails_stays_open(settled, engine):
    log, listener = Log(), Log().of("b")
    engine.failing = {13}
    assert end(settled, "a", log, 13)
    assert settled.join(Chunk(inputs(2), find(settled, "b"), final=True), 0, 50, listener)
    settled.joined.cancel(find(settled, "b"), listener, 0)
    assert joined(settled, "b", log) == [True]  # the same group, and not the last step
    run_until_idle(settled, engine)
    assert log == {"a": "engine_failed", "b": fold([1, 2])[-1:]}
    assert [find(settled, name).position for name in "ab"] == [1, 2]


def test_work_behind_the_last_step_fails(settled, engine):
    log = Log()
    assert end(settled, "a", log)
    behind = submit(settled, "a", inputs(3), 0, LATER)
    run_until_idle(settled, engine)
    assert (log["a"], failure(behind)) == (fold([1, 2])[-1:], "session_closed")


def test_retries_of_joined_first_and_last_steps(settled, engine):
    log = Log()
    settled.close(find(settled, "d"), 0)
    start(settled, "new", log, position=0)
    first = submit(settled, "new", inputs(1), 0, LATER, position=0)
    assert not end(settled, "a", log, position=1)  # its reply is kept after the end
    assert end(settled, "b", log)
    with pytest.raises(PayloadMismatch):
        submit(settled, "b", inputs(2), 0, LATER, position=1)
    last = submit(settled, "b", inputs(2), 0, LATER, position=1, final=True)
    run_until_idle(settled, engine)
    assert (answer(first), answer(last)) == (fold([1]), fold([1, 2])[-1:])
    assert log == {"new": fold([1]), "b": fold([1, 2])[-1:]}
    with pytest.raises(SessionClosed):
        find(settled, "b")


def test_valid_step_behind_an_invalid_first_one_finds_the_session_closed(s, engine):
    log = Log()
    start(s, "new", log, INVALID)
    with pytest.raises(SessionClosed):
        submit(s, "new", inputs(3), 0, LATER, position=0)
    assert log == {"new": "non_finite_input"}
    run_until_idle(s, engine)


def test_joined_step_keeps_its_own_deadline(settled, engine):
    log = Log()
    for now, name in enumerate("abc"):
        assert join(settled, find(settled, name), 2, log.of(name), now)
    behind = submit(settled, "a", inputs(3), 2, LATER)
    again = submit(settled, "b", inputs(2), 2, LATER, position=1)
    run_until_idle(settled, engine, now=51)
    assert log == {"a": "deadline_exceeded", "b": "deadline_exceeded", "c": fold([1, 2])[-1:]}
    assert (answer(behind), failure(again)) == (fold([1, 3])[-1:], "deadline_exceeded")
    assert settled.counters.failed["deadline_exceeded"] == 2
    assert [find(settled, name, 51).position for name in "abc"] == [2, 1, 2]


def test_an_invalid_step_does_not_take_the_position_of_a_valid_one(settled, engine):
    log = Log()
    joined(settled, "ab", log, INVALID)
    valid = submit(settled, "a", inputs(3), 0, LATER, position=1)
    assert log == {"a": "non_finite_input"}
    run_until_idle(settled, engine)
    assert answer(valid) == fold([1, 3])[-1:]


def test_invalid_step_does_not_refresh_its_session(settled, engine):
    join(settled, find(settled, "a"), INVALID, Log().of("a"), now=60)
    run_until_idle(settled, engine, now=60)
    with pytest.raises(SessionExpired):
        find(settled, "a", 101)


def test_full_queue_refuses_steps(settled):
    full = SchedulerLimits(max_queue=2)
    scheduler = Scheduler(settled.traits, settled.sessions.limits, full)
    sessions = [scheduler.open(name, 0) for name in "abc"]
    for session in sessions:
        session.applied = None
    assert [join(scheduler, session, 2, Joiner(print)) for session in sessions] == [True, True, False]
    assert scheduler.in_flight == 2
    assert [session.expected for session in sessions] == [1, 1, 0]


@pytest.mark.parametrize("joined", ["other", "left"])
def test_full_queue_reserves_a_place_for_a_tenant_without_waiting_work(settled, joined):
    scheduler = Scheduler(settled.traits, SessionLimits(7), SchedulerLimits(max_queue=4))
    mine = [scheduler.open(owned("mine", str(i)), 0) for i in range(6)]
    theirs = scheduler.open(owned("theirs", "0"), 0)
    for session in (*mine, theirs):
        session.applied = None
    joiner = Joiner(print)
    assert join(scheduler, mine[0], 2, joiner)
    if joined == "left":
        scheduler.joined.cancel(mine[0], joiner, 0)
    for session in mine[1 : 4 if joined == "other" else 5]:
        scheduler.submit(Chunk(inputs(2), session), 0, LATER)
    scheduler.submit(Chunk(inputs(2), theirs), 0, LATER)
    with pytest.raises(QueueFull):
        scheduler.submit(Chunk(inputs(2), mine[5]), 0, LATER)
    assert scheduler.in_flight == 5


@pytest.mark.parametrize("patient", [False, True])
def test_overload_refuses_the_newest_steps_unless_they_are_patient(settled, engine, monkeypatch, patient):
    monkeypatch.setattr(Joiner, "patient", patient)
    submit_sequence(settled, inputs(1), 0, LATER)
    _, batch = settled.next_turn(0)
    log = Log()
    assert joined(settled, "abc", log) == [True] * 3
    chunks = [submit_sequence(settled, inputs(1), 0, LATER) for _ in range(3)]
    monkeypatch.setattr(settled.overload, "begins", lambda *_: True)
    settled.pace.seconds_per_step, settled.overload.most_wait = 1.0, 2.5
    settled.complete(batch, *engine.run(batch), 0, 1.0)
    assert [name for name, outcome in log.items() if outcome == "queue_full"] == ([] if patient else ["c"])
    assert [chunk.outcome is None for chunk in chunks] == [patient, patient, False]
    monkeypatch.undo()
    run_until_idle(settled, engine)
    assert all(log[name] == fold([1, 2])[-1:] for name in ("abc" if patient else "ab"))
