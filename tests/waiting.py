"""How tests wait: for a named condition, always with a time limit. No other test module polls.

A test waits for an event, a future or a pipe where one exists. Polling is for conditions that nothing announces, such
as the state of another process.
"""

import asyncio
import inspect
import itertools
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Self

#: Seconds until a test gives up. Generous, because a busy machine can be ten times slower than an idle one.
PATIENCE = 120.0
#: Pauses grow with the time already waited, because polling takes processor time from the awaited work.
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.002, 0.05
#: Turns of the event loop before the first pause; usually the loop itself makes the condition true.
_TURNS = 50


def until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Return as soon as the condition holds; fail if it does not come true."""
    began, pause = time.monotonic(), threading.Event()
    while not condition():
        pause.wait(_next_pause(began, what))


async def reached(condition: Callable[[], object | Awaitable[object]], what: str = "the condition") -> None:
    """Like `until`, but lets other tasks of the event loop run. The condition may be a coroutine function."""
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
    """Run the event loop for this many turns, before a test asserts that something has not happened."""
    for _ in range(count):
        await asyncio.sleep(0)


class LoopTime:
    """A stopwatch that stands still while the machine does not run this event loop.

    seconds: Seconds since it was started, counted in ticks of the loop.
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
