"""Rollouts: chunks that compute their later inputs from their own outputs, one time step at a time.

A rollout is a chunk that runs in pieces. Each step waits in the lane of single steps, so it shares batches with other
sessions' steps. Like every chunk, a rollout is applied as a whole or not at all.
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

#: Computes the inputs of one step, each (1, *shape), from the previous piece's outputs and the step's position.
Feed = Callable[[Tensors, int], Tensors]
#: Inputs and outputs of time steps that have run.
Piece = tuple[Tensors, Tensors]


class Rollout(Chunk):
    """`length` time steps, where the request gives only the first ones.

    Attributes:
        inputs: The digest of the request, by which a retry is recognised.
        given: The first time steps.
        ran: Completed pieces, except the last, which comes with the reply.
        begun: Inputs of the last piece that has begun.
        followers: Called after each piece is added to `ran`.

    Args:
        digest: Digest of the request, (n,) uint8 with n > 1.
        given: Inputs, each (T, *shape).
        length: Time steps in total.
        feed: Computes the inputs of the other steps. If it raises UnrollError, the rollout fails.
        position: Position of the first step.
        session: None to run on `state_row` only.
        state_row: See `Chunk`.
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
        self._ready = given  # inputs of the next steps
        self.begun: Tensors = ()

    @property
    def steps_ready(self) -> int:
        """How many of the next time steps have inputs."""
        return len(self._ready[0])

    def take_inputs(self, steps: int) -> Tensors:
        """Take the inputs of the next piece, which is about to run."""
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
    """Limits a model's running rollouts. Each occupies a workspace, and long chunks need workspaces, too."""

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
