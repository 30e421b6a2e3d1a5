"""Overload detection: an overload means that more work arrives than runs; a long queue by itself does not."""

import math

from unroll.service.scheduler.limits import SchedulerLimits

#: With no more chunks than this in flight, there is no overload, however long they wait.
_CROWD = 256
#: Ratio of arriving work to completed work per round: above the first, an overload begins at once; above the second, it
#: begins after this many consecutive rounds.
_TWICE, _MORE, _ROUNDS = 2.0, 1.1, 3
#: A standing queue is an overload if it exceeds the permitted wait this many times.
_STANDING = 5.0
#: An overload ends after this long without a refusal.
_CALM_SECONDS = 0.8


class Overload:
    """Detects overloads, and limits how long new work may wait during one.

    A long queue by itself is not an overload: clients that wait for each answer fill the queue once, and it then keeps
    its length. Therefore arrivals are compared with completed work in rounds. A round lasts as long as the waiting work
    takes to run. An overload begins when twice as much work arrives in a round as ran in it, or somewhat more in each
    of several rounds. A load generator with all its connections in use behaves like many waiting clients, so a queue
    that stays at several times the permitted wait is an overload, too. There is none while `_CROWD` chunks or fewer are
    in flight, or no more than fit in a batch.

    Attributes:
        most_wait: Seconds that new work may wait; infinite when there is no overload.
        efficient_seconds: Duration of the smallest batch with nearly the lowest cost per step. While one such batch
            runs, the next must be able to fill.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self._target = limits.overload_wait
        self._crowd = max(_CROWD, limits.max_batch)
        self.efficient_seconds = 0.0
        self.most_wait = math.inf
        self._refused_at = -math.inf
        self._began: float | None = None  # start of the round
        self._waited = 0.0  # seconds of work that was waiting at the start
        self._growing = 0  # consecutive rounds with more arriving than completed work

    def begins(self, in_flight: int, wait: float, now: float) -> bool:
        """Update after a batch; return whether an overload has just begun.

        Args:
            in_flight: Chunks in flight.
            wait: Seconds of waiting work.
        """
        if self.most_wait < math.inf:
            if now - self._refused_at > _CALM_SECONDS:
                self.most_wait, self._began = math.inf, None
        elif in_flight <= self._crowd or wait <= self._target or not self._target:
            self._began, self._growing = None, 0
        elif self._began is None:
            self._began, self._waited = now, wait
        elif self._grows(wait, now):
            self._refused_at, self._growing = now, 0
            self.most_wait = self._limit
            return True
        return False

    @property
    def _limit(self) -> float:
        return max(self._target, 2 * self.efficient_seconds)

    def _grows(self, wait: float, now: float) -> bool:
        """Whether more work arrived in this round than ran, or the queue stays too long."""
        assert self._began is not None
        passed = now - self._began
        arrived, ran = wait - max(0.0, self._waited - passed), max(self._waited, passed)
        if arrived > _TWICE * ran:
            return True
        if min(wait, self._waited, passed) > _STANDING * self._limit:
            return True
        if passed >= self._waited:
            self._growing = self._growing + 1 if arrived > _MORE * ran else 0
            self._began, self._waited = now, wait
        return self._growing == _ROUNDS

    def refuse(self, wait: float, now: float) -> bool:
        """Whether to refuse work that would wait for `wait` seconds."""
        if wait <= self.most_wait:
            return False
        if now - self._refused_at > _CALM_SECONDS:  # all work has ended since then, without a refusal
            self.most_wait, self._began = math.inf, None
            return False
        self._refused_at = now
        return True
