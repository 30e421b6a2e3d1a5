"""Long work in slices, so that the event loop gets to others in between."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")

#: Of long work in one turn.
SLICE_SECONDS = 0.001
#: A body or message with more bytes is read in turns of its own: JSON of so many takes about a slice to parse.
LONG_BYTES = 65_536


class Turns:
    """The slices that wait. Each turn of the event loop has room for one of them, whoever's it is."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._scheduled = False

    def call(self, run: Callable[[], None]) -> None:
        """Run a slice in a later turn, after those that wait already."""
        self._waiting.append(run)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._advance)

    async def make(self, parts: Iterator[T]) -> list[T]:
        """All parts, made a slice at a time."""
        made: list[T] = []
        while True:
            await self._next()
            until = perf_counter() + SLICE_SECONDS
            for part in parts:
                made.append(part)
                if perf_counter() > until:
                    break
            else:
                return made

    async def _next(self) -> None:
        """Wait for a turn with room for a slice."""
        turn = asyncio.get_running_loop().create_future()
        self.call(lambda: None if turn.done() else turn.set_result(None))
        await turn

    def _advance(self) -> None:
        run = self._waiting.popleft()
        self._scheduled = bool(self._waiting)
        if self._scheduled:
            asyncio.get_running_loop().call_soon(self._advance)
        run()
