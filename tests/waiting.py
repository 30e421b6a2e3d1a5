"""How tests wait: for a named condition, always with a limit. No other test module polls.

A test awaits an event, a future or a pipe where one exists. Another process announces nothing, so its condition is
polled.
"""

import asyncio
import inspect
import itertools
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Self

#: Seconds until a test gives up. A limit, not a measure: a busy machine takes ten times as long as an idle one.
PATIENCE = 120.0
#: Pauses grow with the time already waited, as polling takes processor time from the awaited work.
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.002, 0.05
#: Turns of the event loop before the first pause, as the loop itself usually makes the condition true.
_TURNS = 50


def until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Return as soon as the condition holds; fail if it does not come true."""
    began, pause = time.monotonic(), threading.Event()
    while not condition():
        pause.wait(_next_pause(began, what))


async def reached(condition: Callable[[], object | Awaitable[object]], what: str = "the condition") -> None:
    """`until` inside an event loop, whose other tasks run in between. The condition may be a coroutine function."""
    began = time.monotonic()
    for turn in itertools.count():
        found = condition()
        if await found if inspect.isawaitable(found) else found:
            return
        pause = _next_pause(began, what)
        await asyncio.sleep(0 if turn < _TURNS else pause)


def _next_pause(began: float, what: str) -> float:
    waited = time.monotonic() - began
    assert waited < PATIENCE, f"{what} did not come true"
    return min(max(_PAUSE_SECONDS, waited / 10), _LONGEST_PAUSE_SECONDS)


async def turns(count: int = 1) -> None:
    """Run the event loop this many turns, before a test asserts that something has not happened."""
    for _ in range(count):
        await asyncio.sleep(0)


class LoopTime:
    """A stopwatch that pauses while the machine does not run this event loop.

    seconds: since the stopwatch was entered, counted by ticks of the loop.
    """

    _TICK_SECONDS = 0.01

    def __init__(self) -> None:
        self.seconds = 0.0

    async def __aenter__(self) -> Self:
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ticking.cancel()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._TICK_SECONDS)
            self.seconds += self._TICK_SECONDS
