"""Stream calls without a connection: partial answers, disconnects between them, thousands of sessions."""

import json
import struct

import numpy as np
import pytest

from unroll.client import Model, errors
from unroll.client.places import Place
from unroll.client.stream_calls import ControlCall, StreamCalls

X = np.float32([[1, 2], [3, 4]])
MODEL = Model.from_json(
    {
        "name": "m",
        "version": "1",
        "digest": "d",
        "inputs": [{"name": "x", "dtype": "float32", "shape": [2], "time": True}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [], "time": True}],
        "static": [],
        "streamable": True,
        "not_streamable_because": None,
    }
)


def outputs(handle: int, end: int, value: float) -> bytes:
    return struct.pack("<BBHIIIQf", 2, 0, 0, 1, handle, 1, end, value)


def answer(calls: StreamCalls, call: ControlCall, **items: object) -> None:
    """Send the call's messages and answer them. Handles are opened at position 0, unless `items` has h0, h1, …"""
    call.begin()
    for message in calls.controls(call):
        sent = json.loads(message)
        handles = [spec["handle"] for spec in sent["sessions"]] if "sessions" in sent else sent["handles"]
        found = []
        for handle in handles:
            opened = {"session_id": f"s{handle}", "position": 0, "durability": "memory"}
            found.append({"handle": handle} | dict(items.get(f"h{handle}", opened)))  # type: ignore[call-overload]
        op = {"open": "opened", "close": "closed"}.get(sent["op"], "detached")
        calls.receive(json.dumps({"op": op, "sessions": found}))


def opened(calls: StreamCalls, count: int) -> list[Place]:
    call = calls.open(count, "new", None, None)
    answer(calls, call)
    places, others, refused = calls.opened(call, "new")
    assert (others, refused) == ([], None)
    return places


def test_positions_advance_with_the_outputs_and_not_before() -> None:
    """A caller that gives up after half of the answers gets no outputs and sends both steps again."""
    calls = StreamCalls(MODEL)
    one, two = opened(calls, 2)
    call = calls.steps([one, two], X, chunk=False, several=True)
    call.begin()
    (frame,) = calls.frames([call])
    calls.receive(outputs(one.handle, 1, 0.5))
    assert not call.settled
    call.end()
    assert (one.position, two.position) == (0, 0)

    again = calls.steps([one, two], X, chunk=False, several=True)
    again.begin()
    assert list(calls.frames([again])) == [frame]
    calls.receive(outputs(two.handle, 1, 0.25))
    calls.receive(outputs(one.handle, 1, 0.5))
    assert again.complete
    assert again.result(chunk=False, several=True).tolist() == [0.5, 0.25]
    assert (one.position, two.position) == (1, 1)


def test_caller_may_reuse_its_array() -> None:
    calls = StreamCalls(MODEL)
    (one,) = opened(calls, 1)
    x = X[0].copy()
    call = calls.steps([one], x, chunk=False, several=False)
    call.begin()
    (frame,) = calls.frames([call])
    x[:] = 9
    assert list(calls.frames([call])) == [frame]


def test_outputs_of_other_positions_and_handles_are_ignored() -> None:
    calls = StreamCalls(MODEL)
    one, two = opened(calls, 2)
    call = calls.steps([one], X[0], chunk=False, several=False)
    call.begin()
    for frame in (outputs(one.handle, 7, 1.0), outputs(two.handle, 1, 1.0), outputs(99, 1, 1.0)):
        calls.receive(frame)
    assert not call.settled
    for frame in (b"\x02", b"\x05" + bytes(23), outputs(one.handle, 1, 1.0)[:-1]):
        with pytest.raises(errors.UnrollError, match="an invalid frame for 'm'"):
            calls.receive(frame)


def test_thousands_of_sessions_are_resumed_in_several_messages() -> None:
    """A refusal of one message affects only its sessions."""
    calls = StreamCalls(MODEL)
    places = opened(calls, 2500)
    call = calls.resume()
    assert call is not None
    call.begin()
    messages = [json.loads(message)["sessions"] for message in calls.controls(call)]
    assert [len(message) for message in messages] == [1000, 1000, 500]
    calls.receive(json.dumps({"op": "error", "code": "body_too_large", "detail": "too large"}))
    for message in messages[1:]:
        found = [{"handle": spec["handle"], "session_id": "s", "position": 0} for spec in message]
        calls.receive(json.dumps({"op": "opened", "sessions": found}))
    calls.resumed(call)
    assert [place.lost is None for place in places] == [False] * 1000 + [True] * 1500


def test_long_static_inputs_do_not_make_a_message_too_long() -> None:
    call = ControlCall("open", {handle: {"handle": handle, "static": {"e": [0.5] * 9000}} for handle in range(30)})
    sizes = [len(text) for _, text in call.messages()]
    assert len(sizes) > 2
    assert max(sizes) < 2**19


def test_sessions_opened_before_a_break_are_reopened() -> None:
    calls = StreamCalls(MODEL)
    call = calls.open(2, "new", None, None)
    full = {"error": {"code": "capacity_exhausted", "detail": "full", "retry_after": 1}}
    answer(calls, call, h1=full)
    assert call.settled
    assert not call.complete
    assert calls.resume() is None  # a new connection: no session is known to be open
    answer(calls, call)
    places, _, refused = calls.opened(call, "new")
    assert refused is None
    assert [place.handle for place in places] == [0, 1]


def test_retried_open_does_not_adopt_another_clients_session() -> None:
    calls = StreamCalls(MODEL)
    call = calls.open(["theirs"], "new", None, None)
    answer(calls, call, h0={"session_id": "theirs", "position": 5, "durability": "memory"})
    places, others, refused = calls.opened(call, "new")
    assert (places, [place.id for place in others]) == ([], ["theirs"])
    assert isinstance(refused, errors.SessionExists)
    with pytest.raises(errors.InvalidInput, match="a list of ids"):
        calls.open("theirs", "new", None, None)
