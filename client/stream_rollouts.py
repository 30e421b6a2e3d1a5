"""Rollouts on a stream, without I/O."""

import json
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from unroll.client.errors import ServerError
from unroll.client.places import Place
from unroll.client.retries import Retries, refused_for_now
from unroll.client.rollout_calls import RolledStep, Rollout, RolloutWish
from unroll.client.tensors import Model


class StreamRollout(Rollout):
    """A rollout on a stream.

    Args:
        model: The session's model.
        place: The session, which advances when a rollout on it has ended.
        wish: The arguments of the rollout.

    Attributes:
        sent: Whether the rollout is running on the connection.
        ready: Steps that the caller has not taken yet.
        refused: The error that ended it, if any.
        on_settled: Called when something has arrived.

    Raises:
        InvalidInput: An array does not fit; nothing was sent.
    """

    def __init__(self, model: Model, place: Place, wish: RolloutWish) -> None:
        super().__init__(model, place.position, wish, None if place.last is None else model.last_step(place.last))
        self.place = place
        self.sent = False
        self.ready: deque[RolledStep] = deque()
        self.refused: ServerError | None = None
        self.on_settled: Callable[[], object] | None = None

    @property
    def settled(self) -> bool:
        """Is there something for the caller?"""
        return bool(self.ready) or self.complete or self.refused is not None

    def pause(self, refused: ServerError, retries: Retries) -> float:
        """Seconds until the rollout is sent again. Raises the refusal if a retry would fail again, or time is up."""
        if not refused_for_now(refused) or (pause := retries.pause(refused.retry_after)) is None:
            raise refused
        self.refused = None
        return pause

    def message(self) -> str:
        """The message that starts the rollout, for the first time or again."""
        self.sent = True
        self.restart()
        return json.dumps({"op": "rollout", "handle": self.place.handle, **self.members})

    def receive(self, end: int, arrays: Sequence[np.ndarray]) -> None:
        """Receive steps up to the position `end`: `arrays` holds their inputs, then their outputs."""
        inputs = len(self._model.inputs)
        self.ready.extend(self.steps(end, arrays[:inputs], arrays[inputs:]))
        self._wake()

    def take(self) -> RolledStep:
        """Take the next step. The session advances with the last one; a caller that stops earlier does not see it."""
        step = self.ready.popleft()
        self._advance()
        return step

    def end(self) -> None:
        self.complete = True
        self._advance()
        self._wake()

    def _advance(self) -> None:
        if self.complete and not self.ready and self.members["on"] == "session":
            self.place.position, self.place.last = self._reached, self.last

    def fail(self, error: ServerError) -> None:
        self.sent, self.refused = False, error
        self._wake()

    def _wake(self) -> None:
        if self.settled and self.on_settled is not None:
            self.on_settled()
