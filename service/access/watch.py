"""Notices that a key is good no longer while a stream that it opened is open."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

from unroll.service.access.keys import Key

#: The clock of the machine may be set: look again at least so often.
_MOST_SECONDS = 3600.0


class KeyWatch:
    """Calls `on_end` when the key is good no longer, until `stop`.

    Args:
        current: The key as it is permitted now, with its expiry; None if it is good no longer.
    """

    def __init__(self, key: Key, current: Callable[[Key], Key | None], on_end: Callable[[], None]) -> None:
        self._key = key
        self._current = current
        self._on_end = on_end
        self._timer: asyncio.TimerHandle | None = None
        self.check()

    def check(self) -> None:
        """Look now, and again when the key expires."""
        self.stop()
        key = self._current(self._key)
        if key is None:
            self._on_end()
        elif key.expires is not None:
            left = (key.expires - datetime.now(UTC)).total_seconds()
            self._timer = asyncio.get_running_loop().call_later(min(left, _MOST_SECONDS), self.check)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
