"""Chunks that open and close sessions, their retries and late duplicates, and the tombstones of closed sessions."""

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
    SessionClosed,
    SessionUnknown,
)
from unroll.service.core.session_ids import owned
from unroll.service.scheduler.closed_sessions import ClosedSessions
from unroll.service.scheduler.limits import SessionLimits
from unroll.service.scheduler.reply import payload_digest
from unroll.service.store.record import Kept


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


def test_start_opens_a_session_that_expired(s, engine):
    s.open("a", 0)
    chunk = submit(s, "a", inputs(4), 100, LATER, start=True)
    run_until_idle(s, engine, 100)
    assert answer(chunk) == fold([4])


def test_tombstone_expires(s):
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


def test_late_duplicate_of_an_opening_request_opens_no_second_session(s, engine):
    submit(s, "a", inputs(1), 0, LATER, position=0, start=True)
    submit(s, "a", inputs(2), 0, LATER, position=1, final=True)
    run_until_idle(s, engine)
    with pytest.raises(SessionClosed):
        submit(s, "a", inputs(1), 0, LATER, position=0, start=True)
    another = submit(s, "a", inputs(5), 0, LATER, position=0, start=True)
    run_until_idle(s, engine)
    assert answer(another) == fold([5])


def test_failed_start_leaves_no_session_and_can_be_retried(s, engine):
    late = submit(s, "a", inputs(1), 0, 5, position=0, start=True)
    behind = submit(s, "a", inputs(2), 0, LATER)
    run_until_idle(s, engine, 5)
    assert (failure(late), failure(behind)) == ("deadline_exceeded", "session_closed")
    assert "a" not in s.sessions
    again = submit(s, "a", inputs(1), 6, LATER, position=0, start=True)
    run_until_idle(s, engine, 6)
    assert answer(again) == fold([1])


def test_opening_request_opens_a_new_session_once_the_tombstone_expires(s, engine):
    submit(s, "a", inputs(1), 0, LATER, position=0, start=True)
    submit(s, "a", inputs(2), 0, LATER, position=1, final=True)
    run_until_idle(s, engine)
    again = submit(s, "a", inputs(1), 60, LATER, position=0, start=True)
    run_until_idle(s, engine, 60)
    assert answer(again) == fold([1])


def test_tenant_that_closes_many_sessions_does_not_evict_tombstones_of_other_tenants():
    closed = ClosedSessions(SessionLimits(tombstones=20, closing_reply_bytes=1000))
    outputs = (np.zeros(100, np.uint8),)
    last = Kept(0, 1, payload_digest(outputs), outputs[0].tobytes())
    calm = [owned("calm", f"{i}") for i in range(5)]
    for i in range(100):
        if i < 5:
            closed.add(calm[i], SessionClosed, 0, b"", last)
        closed.add(owned("busy", f"{i}"), SessionClosed, 0, b"", last)
    assert len(closed) == 20
    assert all(closed.get(session_id, 1) and closed.closing_chunk(session_id, 0, outputs, 1) for session_id in calm)
    assert owned("busy", "99") in closed
    closed.add(owned("busy", "100"), SessionClosed, 4000, b"")
    assert len(closed) == 1, "what is old is forgotten, whoever's it is"


def test_the_replies_of_closing_chunks_are_bounded_in_bytes():
    closed = ClosedSessions(SessionLimits(closing_reply_bytes=100))

    def known() -> str:
        return "".join(name for name in "abcd" if closed.closing_chunk(name, 0, inputs(1), 0) is not None)

    last = Kept(0, 5, payload_digest(inputs(1)), bytes(40))
    for name in "abc":
        closed.add(name, SessionClosed, 0, b"", last)
    assert known() == "bc"
    closed.forget("b")
    closed.add("d", SessionClosed, 0, b"", last)
    assert known() == "cd"
