"""Unanswered entries are bounded: reading stops until answers have been sent."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
from fake_link import Wire
from streams import frame
from waiting import reached

from unroll.service.api.stream import flow
from unroll.service.api.stream.flow import WINDOW, FlowControl


@dataclass
class Calls:
    """The calls of flow control, in order."""

    made: list[str] = field(default_factory=list)

    def flow(self, step_bytes: int = 4) -> FlowControl:
        pause, resume, drained = (partial(self.made.append, name) for name in ("pause", "resume", "drained"))
        return FlowControl(step_bytes, pause, resume, drained)


def test_reading_pauses_once_for_several_reasons():
    calls = Calls()
    flow = calls.flow()
    flow.acquire(WINDOW + 1, WINDOW + 1)
    flow.update()
    flow.backlogged, flow.writable = True, False
    flow.update()
    assert (calls.made, flow.state) == (["pause"], "paused by window and control and client")
    flow.release(1, 1)
    flow.backlogged = False
    flow.update()
    assert (calls.made, flow.state) == (["pause"], "paused by client")
    flow.writable = True
    flow.update()
    assert (calls.made, flow.state) == (["pause", "resume"], "open")


def test_a_drain_ends_once_with_the_last_answer():
    calls = Calls()
    flow = calls.flow()
    flow.acquire(2, 5)
    flow.busy = flow.draining = True
    flow.update()
    flow.release(2, 5)
    assert (calls.made, flow.drained) == (["pause"], False)
    flow.busy = False
    flow.update()
    flow.update()
    assert (calls.made, flow.drained) == (["pause", "drained"], True)


async def test_the_window(wire: Wire):
    """With more unanswered entries, reading pauses until answers have been sent."""
    await wire.bind(WINDOW + 1)
    wire.frame(range(WINDOW))
    assert wire.flow == []
    wire.frame(range(WINDOW, WINDOW + 1))
    assert wire.flow == ["pause"]
    assert f"{WINDOW + 1} entries" in repr(wire.connection)
    wire.engine.release()
    await reached(lambda: len(wire.answered()) == WINDOW + 1)
    assert wire.flow == ["pause", "resume"]
    assert "open, 2049 sessions, 0 entries" in repr(wire.connection)


async def test_the_window_in_bytes(wire: Wire, monkeypatch: pytest.MonkeyPatch):
    """Few entries may have large inputs and answers."""
    monkeypatch.setattr(flow, "WINDOW_BYTES", 4096)
    await wire.bind(3)
    steps = 4096 // sum(spec.nbytes for spec in (*wire.manifest.inputs, *wire.manifest.outputs)) // 2
    wire.frame(range(2), steps)
    assert wire.flow == []
    wire.frame(range(2, 3))
    assert wire.flow == ["pause"]
    wire.frame(range(3, 4), steps)  # no such handle: the refusal is an answer
    wire.connection.on_binary(frame((2, 99, np.ones((7, 3), "<f4")), (0, 99, np.ones((9, 3), "<f4"))))
    wire.engine.release()
    await reached(lambda: len(wire.answered()) == 3)
    assert wire.flow == ["pause", "resume"]
    wire.frame(range(2), steps)
    assert wire.flow == ["pause", "resume"]
    wire.frame(range(2, 3))
    assert wire.flow == ["pause", "resume", "pause"]


async def test_reading_pauses_while_the_client_does_not_read(wire: Wire):
    wire.connection.on_writable(False)
    wire.connection.on_writable(False)
    assert wire.flow == ["pause"]
    assert "paused" in repr(wire.connection)
    wire.connection.on_writable(True)
    assert wire.flow == ["pause", "resume"]


async def test_reading_resumes_when_no_reason_to_pause_is_left(wire: Wire):
    await wire.bind(WINDOW + 1)
    wire.frame(range(WINDOW + 1))
    wire.connection.on_writable(False)
    wire.engine.release()
    await reached(lambda: len(wire.answered()) == WINDOW + 1)
    assert wire.flow == ["pause"]
    wire.connection.on_writable(True)
    assert wire.flow == ["pause", "resume"]
