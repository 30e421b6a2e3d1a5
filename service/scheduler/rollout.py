"""Rollouts: chunks whose later inputs are made of their own outputs, one time step at a time.

A rollout is a chunk that runs in pieces. Each of its steps waits in the lane of single steps, so it shares batches with
the steps of clients, and they go on between its steps. Like every chunk it is applied as a whole, or not at all.
"""

from collections.abc import Callable

import numpy as np

from unroll.service.core.errors import QueueFull, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.chunk import Chunk
from unroll.service.scheduler.counters import Counters
from unroll.service.scheduler.limits import SchedulerLimits
from unroll.service.scheduler.reply import Outcome
from unroll.service.scheduler.session import Session

#: Makes the inputs of one step, each (1, *shape), of the outputs of the piece before it and the step's position.
Feed = Callable[[Tensors, int], Tensors]
#: Time steps that have run: their inputs and outputs.
Piece = tuple[Tensors, Tensors]


class Rollout(Chunk):
    """`length` time steps, of which only the first are given.

    inputs: what a retry is recognised by, the digest of the request. given: the first time steps. ran: the pieces that
    have run, but the last, whose outputs come with the reply. begun: the inputs of the last piece that has begun.
    followers: called after each of `ran`.

    Args:
        digest: of the request, (n,) uint8 with n > 1.
        given: inputs, each (T, *shape).
        feed: makes the inputs of the others. If it raises UnrollError, the rollout fails.
        session, state_row: as of a chunk; without a session the rollout runs on the state row alone.
    """

    keeps_workspace = True

    def __init__(
        self,
        digest: np.ndarray,
        given: Tensors,
        length: int,
        feed: Feed,
        position: int,
        *,
        session: Session | None = None,
        state_row: np.ndarray | None = None,
    ) -> None:
        super().__init__((digest,), session, position, state_row=state_row)
        self.length = length
        self.given = given
        self.feed = feed
        self.ran: list[Piece] = []
        self.followers: list[Callable[[], None]] = []
        self.counters: Counters | None = None
        self._ready = given  # inputs of steps that have not run
        self.begun: Tensors = ()

    @property
    def steps_ready(self) -> int:
        """Time steps whose inputs are known and that have not run."""
        return len(self._ready[0])

    def take_inputs(self, steps: int) -> Tensors:
        """The inputs of the next piece, which runs now."""
        self.begun = tuple([array[:steps] for array in self._ready])
        return self.begun

    def prepare_next(self) -> UnrollError | None:
        assert self.pieces is not None
        outputs = self.pieces[-1]
        self.ran.append((self.begun, outputs))
        for follower in tuple(self.followers):
            follower()
        if self.done < len(self.given[0]):
            self._ready = tuple([array[self.done :] for array in self.given])
            return None
        try:
            self._ready = self.feed(outputs, self.start + self.done)
        except UnrollError as error:
            return error
        return None

    def answer(self, outcome: Outcome) -> None:
        if self.counters is not None:
            self.counters.rollout_steps += self.done
        super().answer(outcome)


class Rollouts:
    """The rollouts of a model that have not ended. Each keeps an arena row, of which long chunks need some, too."""

    def __init__(self, limits: SchedulerLimits, counters: Counters) -> None:
        self._most = max(1, limits.max_batch // 2)
        self._counters = counters
        self.begun: list[Rollout] = []

    def __len__(self) -> int:
        return sum(rollout.outcome is None for rollout in self.begun)

    def check_room(self) -> None:
        """Raises QueueFull."""
        if len(self) >= self._most:
            self._counters.refused += 1
            raise QueueFull(f"{self._most} rollouts run on this model, half of --max-batch; retry later")

    def add(self, rollout: Rollout) -> None:
        self.begun = [each for each in self.begun if each.outcome is None]
        self.begun.append(rollout)
        rollout.counters = self._counters
