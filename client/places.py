"""The sessions of a stream."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from unroll.client.errors import ServerError

if TYPE_CHECKING:
    from unroll.client.stream_calls import StepsCall
    from unroll.client.stream_rollouts import StreamRollout


class Place:
    """A session on a stream.

    Attributes:
        handle: The session's number on the stream.
        id, position, durability: As in `Session`.
        lost: Why the session can no longer be stepped, or None.
        call: Its unanswered steps, if any.
        last: The outputs of its last chunk, if known.
        rollout: The running rollout, if any.
    """

    __slots__ = ("call", "durability", "handle", "id", "last", "lost", "position", "rollout")

    def __init__(self, handle: int, session_id: str, position: int, durability: str) -> None:
        self.handle = handle
        self.id = session_id
        self.position = position
        self.durability = durability
        self.lost: ServerError | None = None
        self.call: StepsCall | None = None
        self.last: Sequence[np.ndarray] | None = None
        self.rollout: StreamRollout | None = None

    def fail(self, error: ServerError) -> None:
        """Fail the pending steps and the running rollout."""
        if self.call is not None:
            self.call.fail(self.handle, error)
        if self.rollout is not None:
            self.rollout.fail(error)


class PlaceFacts:
    """The properties of a session on a stream, for both clients."""

    place: Place

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id!r} at {self.position}>"

    @property
    def id(self) -> str:
        return self.place.id

    @property
    def position(self) -> int:
        """The number of time steps that the session has consumed, as far as this client knows."""
        return self.place.position

    @property
    def durability(self) -> str:
        return self.place.durability
