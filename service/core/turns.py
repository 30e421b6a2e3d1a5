"""Long work in slices, so that the event loop gets to others in between."""

import asyncio
from collections import deque
from collections.abc import Callable


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

    def _advance(self) -> None:
        run = self._waiting.popleft()
        self._scheduled = bool(self._waiting)
        if self._scheduled:
            asyncio.get_running_loop().call_soon(self._advance)
        run()
