"""Admission: what is accepted and not yet answered, how fast work runs, and what is refused at once because of it."""

from unroll.service.core.errors import DeadlineUnreachable, QueueFull
from unroll.service.scheduler.counters import Counters
from unroll.service.scheduler.limits import SchedulerLimits

#: A piece of long work takes as long as all other work took since the last piece, within these bounds.
_LEAST_SECONDS, _MOST_SECONDS = 0.001, 0.01
#: A piece when there is no other work: what arrives while it runs waits for it.
_ALONE_SECONDS = 0.005


class Pace:
    """How long work takes lately, everything included, and how long a piece of long work may be.

    seconds_per_step: of all work. The warm-up gives its first value.
    """

    def __init__(self, limits: SchedulerLimits, seconds_per_step: float = 0.0) -> None:
        self._limits = limits
        self.seconds_per_step = seconds_per_step
        self._in_pieces = 0.0  # seconds per step of long work
        self._last_piece: float | None = None  # when it ended, if there was no rest since
        self._shared = False  # did other work run since then?

    def observe(self, steps: int, seconds: float, now: float, *, long: bool) -> None:
        """A batch of so many steps ran in `seconds`."""
        # Weighted by steps: the fixed cost of small batches says nothing about how long a full queue takes.
        self.seconds_per_step += (seconds / steps - self.seconds_per_step) * steps / (steps + 1000)
        if long:
            self._in_pieces += (seconds / steps - self._in_pieces) * (0.2 if self._in_pieces else 1.0)
            self._last_piece = now
        self._shared = not long

    def rest(self) -> None:
        """There is nothing to do."""
        self._last_piece = None

    def piece(self, rows: int, now: float) -> int:
        """Time steps to run now of each of `rows` long chunks."""
        if not self._in_pieces:
            return self._limits.piece_steps
        seconds = _ALONE_SECONDS
        if self._shared and self._last_piece is not None:
            seconds = min(max(now - self._last_piece, _LEAST_SECONDS), _MOST_SECONDS)
        most = max(1, self._limits.max_batch_steps // rows)
        return min(max(1, int(seconds / (self._in_pieces * rows))), most)


class Admission:
    """Refuses work that would wait in vain: beyond `max_queue` chunks, or beyond its deadline.

    in_flight: chunks accepted and not yet answered. waiting_steps: their steps that run before new work, about: all of
    a short chunk, the next piece of a long one.
    """

    def __init__(self, limits: SchedulerLimits, pace: Pace, counters: Counters) -> None:
        self._max_queue = limits.max_queue
        self._pace = pace
        self._counters = counters
        self.in_flight = 0
        self.waiting_steps = 0

    def estimated_wait(self) -> float:
        """Seconds until work accepted now would begin, from the pace seen lately."""
        return self.waiting_steps * self._pace.seconds_per_step

    def check(self, now: float, deadline: float) -> None:
        """Check that a chunk submitted now would be accepted.

        Raises:
            QueueFull: too many chunks wait.
            DeadlineUnreachable: the chunk would begin after its deadline.
        """
        wait = self.waiting_steps * self._pace.seconds_per_step
        if self.in_flight >= self._max_queue:
            self._counters.refused += 1
            raise QueueFull(f"{self.in_flight} requests are waiting", retry_after=max(wait, 0.1))
        if now + wait > deadline:
            self._counters.refused += 1
            raise DeadlineUnreachable(f"the wait is about {wait:.1f} s, longer than the deadline allows", wait)

    def admit(self, steps: int, now: float, deadline: float) -> None:
        """Accept a chunk of which so many steps wait. Raises what `check` raises."""
        wait = self.waiting_steps * self._pace.seconds_per_step
        if self.in_flight >= self._max_queue or now + wait > deadline:
            self.check(now, deadline)
        self.in_flight += 1
        self.waiting_steps += steps

    def check_invariants(self) -> None:
        """Raises AssertionError. Meant for a moment when there is no work."""
        assert self.in_flight == 0, f"{self.in_flight} chunks are lost"
        assert self.waiting_steps == 0, f"{self.waiting_steps} steps are lost"
