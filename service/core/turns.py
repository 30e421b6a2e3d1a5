"""Runs long work in slices, so that the event loop can serve other clients in between."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")

#: Duration of a slice.
SLICE_SECONDS = 0.0005
#: Bodies and messages with more bytes are decoded in separate turns; parsing this much JSON takes about one slice.
LONG_BYTES = 65_536


#: After a slice of more than the first, in seconds, the next one waits for the second: a step that arrived takes turns
#: of its own.
_LONG_SECONDS, _PAUSE_SECONDS = 0.002, 0.001


class Turns:
    """The queue of waiting slices. Each turn of the event loop runs one."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._scheduled = False

    @property
    def busy(self) -> bool:
        """Whether slices are waiting."""
        return bool(self._waiting)

    def call(self, run: Callable[[], None], *, first: bool = False) -> None:
        """Run a slice in a later turn, after the waiting slices, or before them if `first`."""
        (self._waiting.appendleft if first else self._waiting.append)(run)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._advance)

    def free(self, parts: list[bytearray]) -> None:
        """Empty a list, one slice at a time: the kernel takes milliseconds to take megabytes back."""
        until = perf_counter() + SLICE_SECONDS
        while parts and perf_counter() < until:
            parts.pop()
        if parts:
            self.call(partial(self.free, parts))

    async def make(self, parts: Iterator[T]) -> list[T]:
        """Collect all parts, one slice at a time."""
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
        turn = asyncio.get_running_loop().create_future()
        self.call(lambda: None if turn.done() else turn.set_result(None))
        await turn

    def _advance(self) -> None:
        run, began, loop = self._waiting.popleft(), perf_counter(), asyncio.get_running_loop()
        try:
            run()
        finally:
            self._scheduled = bool(self._waiting)
            if self._scheduled and perf_counter() - began > _LONG_SECONDS:
                loop.call_later(_PAUSE_SECONDS, self._advance)
            elif self._scheduled:
                loop.call_soon(self._advance)
