"""Clocks. Pure code takes `now` as an argument; asynchronous code has a Clock, tests have a ManualClock."""

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds on a monotonic clock; only differences are meaningful."""


class MonotonicClock:
    now = staticmethod(time.monotonic)


class ManualClock:
    """A clock that moves only by `advance`."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds
