"""Notices an overload: more work arrives than runs. A full queue alone is none."""

import math

from unroll.service.scheduler.limits import SchedulerLimits

#: Fewer chunks than that in flight are no overload, however long they wait.
_CROWD = 256
#: Work that arrives in a round, in multiples of what ran: at once an overload, and one if it is so in several rounds.
_TWICE, _MORE, _ROUNDS = 2.0, 1.1, 3
#: A queue that stays so many times as long as `most_wait` would be.
_STANDING = 5.0
#: An overload is over when nothing was refused for so long.
_CALM_SECONDS = 0.8


class Overload:
    """Notices that more work arrives than runs, and says how long new work may wait then.

    A queue alone is no overload: clients that each wait for their answer fill it once, and then it stays as long as
    they are many. So the work that arrives while everything that waits runs, one round, is compared with what waited.
    It is an overload if twice as much arrives in a round, or somewhat more in each of several rounds. Many clients that
    wait look like a load generator whose connections are all taken, which sends as soon as it can: a queue that
    stays several times as long as it may be in an overload is one. Fewer chunks than `_CROWD`, or than fit in a batch,
    never are one.

    most_wait: seconds that new work may wait; infinite as long as there is no overload. efficient_seconds: of the
    smallest batch in which a step costs about the least: while one runs, the next must be able to fill.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self._target = limits.overload_wait
        self._crowd = max(_CROWD, limits.max_batch)
        self.efficient_seconds = 0.0
        self.most_wait = math.inf
        self._refused_at = -math.inf
        self._began: float | None = None  # when the round did
        self._waited = 0.0  # seconds of work that waited then
        self._growing = 0  # rounds in which more arrived than waited

    def begins(self, in_flight: int, wait: float, now: float) -> bool:
        """A batch has run, and so many chunks and seconds of work wait: is this an overload, and was none before?"""
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
        """Compare the work that has arrived in this round with what has run. Also true if too much stays."""
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
        """Must work that would wait so long be refused?"""
        if wait <= self.most_wait:
            return False
        if now - self._refused_at > _CALM_SECONDS:  # all work ended since, and nothing was refused
            self.most_wait, self._began = math.inf, None
            return False
        self._refused_at = now
        return True
