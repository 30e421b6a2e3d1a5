"""How tests wait: for a named condition, and never without a limit. No other module of the tests polls.

A test awaits what can announce itself: an event, a future, a pipe. What another process does
is announced by nothing, so its condition is evaluated again and again.
"""

import asyncio
import inspect
import itertools
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Self

#: Seconds after which a test gives up. A limit and no measure: a busy machine takes ten times as long as an idle one.
PATIENCE = 120.0
#: A pause grows with what has been waited for already: asking takes processor time from what makes the condition true.
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.002, 0.05
#: Turns of the event loop before the first pause: mostly the loop itself makes the condition true.
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
    """Let the event loop run so many times, before a test says what has not happened."""
    for _ in range(count):
        await asyncio.sleep(0)


class LoopTime:
    """A stopwatch that stands still while the machine has no time for this event loop.

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
