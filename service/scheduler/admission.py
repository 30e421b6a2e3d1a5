"""Admission control: counts the work in flight, estimates its pace, and refuses work that would wait too long."""

import math
from collections.abc import Callable

from unroll.service.core.errors import DeadlineUnreachable, QueueFull
from unroll.service.scheduler.chunk import Chunk
from unroll.service.scheduler.counters import Counters
from unroll.service.scheduler.limits import SchedulerLimits
from unroll.service.scheduler.overload import Overload
from unroll.service.scheduler.session import Owner

#: While other work runs, a piece of long work takes this share of the time since the previous piece.
_SHARE = 0.5
#: Duration of a piece. New arrivals wait for the piece to finish.
_LEAST_SECONDS, _MOST_SECONDS = 0.00025, 0.005


class Pace:
    """Tracks how fast work runs, and sizes the pieces of long chunks.

    seconds_per_step: moving average over all work, including overhead; initialised by the warm-up.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self.seconds_per_step = 0.0
        self._in_pieces = 0.0  # seconds per step of long work
        self._last_piece: float | None = None  # when the last piece ended; None after an idle period
        self._last_other = -math.inf  # when other work last ended

    def observe(self, steps: int, seconds: float, now: float, *, long: bool) -> None:
        """Record a batch of `steps` steps that ran in `seconds`."""
        # Weighted by steps, because the fixed cost of small batches does not predict how fast a full queue drains.
        self.seconds_per_step += (seconds / steps - self.seconds_per_step) * steps / (steps + 1000)
        if long:
            self._in_pieces += (seconds / steps - self._in_pieces) * (0.2 if self._in_pieces else 1.0)
            self._last_piece = now
        else:
            self._last_other = now

    def rest(self) -> None:
        """Record that there is nothing to do."""
        self._last_piece = None

    def piece(self, rows: int, now: float) -> int:
        """How many time steps of each of `rows` long chunks to run next."""
        if not self._in_pieces:
            return self._limits.piece_steps
        if self._last_piece is not None and self._last_other > self._last_piece:
            seconds = (now - self._last_piece) * _SHARE
        else:  # the longer there was no other work, the less likely is it to arrive during the piece
            seconds = now - self._last_other
        seconds = min(max(seconds, _LEAST_SECONDS), _MOST_SECONDS)
        most = max(1, self._limits.max_batch_steps // rows)
        return min(max(1, int(seconds / (self._in_pieces * rows))), most)


class Shares:
    """Lets competing owners into a full queue.

    While several owners compete, they share the rows that the last batch freed. An owner that fills the queue cannot
    shut out the rest, and the queue does not grow.
    """

    def __init__(self, waiting: Callable[[], set[Owner]]) -> None:
        self._waiting = waiting
        self._added: dict[Owner, int] = {}  # chunks beyond the limit, since the last batch
        self._owners: set[Owner] = set()  # owners that competed before that
        self._freed = 0

    def renew(self, freed: int) -> None:
        """Start a new round after a batch that freed `freed` rows."""
        if self._added or self._owners:
            self._owners, self._added = {*self._added}, {}
        self._freed = freed

    def has(self, owner: Owner) -> bool:
        """Whether the owner may add a chunk."""
        if not self._added:
            self._owners |= self._waiting()
        added = self._added.setdefault(owner, 0)
        owners = len(self._owners | self._added.keys())
        return owners > 1 and added < max(1, self._freed // owners)

    def count(self, owner: Owner) -> None:
        self._added[owner] = self._added.get(owner, 0) + 1


class Admission:
    """Refuses work beyond `max_queue` chunks, work that would miss its deadline, and excess work during an overload.

    Attributes:
        in_flight: Chunks accepted and not yet answered.
        waiting_steps: Approximate number of their steps that run before new work: all steps of a short chunk, the next
            piece of a long one.
    """

    def __init__(
        self, limits: SchedulerLimits, pace: Pace, counters: Counters, waiting: Callable[[], set[Owner]]
    ) -> None:
        self._max_queue = limits.max_queue
        self._pace = pace
        self._counters = counters
        self._shares = Shares(waiting)
        self.overload = Overload(limits)
        self.in_flight = 0
        self.waiting_steps = 0

    def estimated_wait(self) -> float:
        """Seconds until work accepted now would begin, at the current pace."""
        return self.waiting_steps * self._pace.seconds_per_step

    def begins_overload(self, rows: int, now: float) -> bool:
        """Update after a batch of `rows` rows was answered; return whether an overload has just begun."""
        self._shares.renew(rows)
        return self.overload.begins(self.in_flight, self.estimated_wait(), now)

    def most_waiting(self) -> float:
        """How many steps may wait."""
        return self.overload.most_wait / self._pace.seconds_per_step

    def refusal(self) -> QueueFull:
        """Count a refusal for lack of room, and return its error."""
        self._counters.refused += 1
        return QueueFull(f"{self.in_flight} requests are waiting", retry_after=max(self.estimated_wait(), 0.1))

    def check(self, now: float, deadline: float, owner: Owner, *, patient: bool = True) -> None:
        """Check that a chunk submitted now would be accepted.

        Args:
            deadline: The time by which it must start.
            patient: Do not refuse it because of an overload; flow control already limits its client.

        Raises:
            QueueFull: Too many chunks are waiting, or the server is overloaded.
            DeadlineUnreachable: The chunk would start after its deadline.
        """
        wait = self.waiting_steps * self._pace.seconds_per_step
        is_full, is_late = self.in_flight >= self._max_queue, now + wait > deadline
        if not (is_full or is_late or (not patient and self.overload.refuse(wait, now))):
            return
        if self.in_flight < self._max_queue + self._max_queue // 4 and self._shares.has(owner):
            return
        if is_full or not is_late:
            raise self.refusal()
        self._counters.refused += 1
        raise DeadlineUnreachable(f"the wait is about {wait:.1f} s, longer than the deadline allows", wait)

    def admit(self, chunk: Chunk, steps: int, now: float) -> None:
        """Accept a chunk with `steps` waiting steps. Raises the errors of `check`."""
        if self.take(steps, now, chunk.deadline):
            return
        owner = chunk.owner
        self.check(now, chunk.deadline, owner, patient=chunk.patient)
        self._shares.count(owner)
        self.in_flight += 1
        self.waiting_steps += steps

    def take(self, steps: int, now: float, deadline: float) -> bool:
        """Accept a chunk with `steps` waiting steps if the queue has room; the fast path of `admit`."""
        wait = self.waiting_steps * self._pace.seconds_per_step
        if self.in_flight >= self._max_queue or now + wait > deadline or wait > self.overload.most_wait:
            return False
        self.in_flight += 1
        self.waiting_steps += steps
        return True

    def has_room(self, now: float, deadline: float) -> bool:
        """Whether `take` would accept a chunk, which does not call this, because it runs for every step."""
        wait = self.estimated_wait()
        return self.in_flight < self._max_queue and now + wait <= deadline and wait <= self.overload.most_wait

    def check_invariants(self) -> None:
        """Raises AssertionError. Call it only when there is no work."""
        assert self.in_flight == 0, f"{self.in_flight} chunks are lost"
        assert self.waiting_steps == 0, f"{self.waiting_steps} steps are lost"
