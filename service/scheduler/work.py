"""The nouns of scheduling: session, chunk, action, batch, reply. Records only; the rules are beside them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from service.core.errors import UnrollError
from service.engine.base import Tensors


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """The answer to a chunk. `position`: time steps the session has consumed, this chunk included."""

    outputs: Tensors
    position: int

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.outputs)


Outcome = Reply | UnrollError


class Life(StrEnum):
    """The states of a session; `sessions.py` holds the transitions."""

    IDLE = "idle"
    WAITING = "waiting"
    RUNNING = "running"
    LEAVING = "leaving"
    GONE = "gone"

    # Enum's own hash is a Python call, and the transition table is read several times a step.
    __hash__ = str.__hash__


@dataclass(frozen=True, slots=True)
class Applied:
    """The last chunk a session consumed: what a retry of it is recognised and answered by."""

    start: int
    digest: bytes
    reply: Reply


@dataclass(slots=True, eq=False)
class Session:
    """One client's stream.

    slot: its row in the arena. source: the row its next chunk reads, the initial row until the first commit.
    position: steps consumed. expected: the position once all accepted work is done. opened_with: digest of the
    request that opened it at position 0, so that its late duplicate does not open another.
    """

    id: str
    slot: int
    source: int
    position: int
    expected: int
    last_used: float
    life: Life = Life.IDLE
    last: Applied | None = None
    opened_with: bytes = b""
    active: "Chunk | Action | None" = None
    pending: "list[Chunk | Action]" = field(default_factory=list)

    def queue(self) -> "list[Chunk | Action]":
        """The accepted work, in the order it will run."""
        work = self.pending if self.active is None else [self.active, *self.pending]
        return [item for item in work if item.outcome is None]

    def __repr__(self) -> str:
        return f"<Session {self.id} {self.life.value} position={self.position} expected={self.expected}>"


@dataclass(slots=True, eq=False)
class Chunk:
    """T >= 1 time steps of one session, or one whole stateless sequence (`session` is None).

    pinned: the client said at which position it belongs (`start`). opens: the session began with it, and ends if it
    fails. final: the session closes after it.
    done: steps already run, for a chunk that is run in pieces; its state is then in row `workspace`.
    running: a batch holds it now. abandoned: what it ends with unless that batch completes it.
    """

    inputs: Tensors
    length: int
    deadline: float
    session: Session | None = None
    start: int = 0
    pinned: bool = False
    opens: bool = False
    final: bool = False
    digest: bytes = b""
    done: int = 0
    workspace: int | None = None
    pieces: list[Tensors] = field(default_factory=list)
    order: int = 0
    running: bool = False
    abandoned: UnrollError | None = None
    outcome: Outcome | None = None
    listeners: list[Callable[[Outcome], None]] = field(default_factory=list)

    def settle(self, outcome: Outcome) -> None:
        self.outcome = outcome
        for listener in self.listeners:
            listener(outcome)


@dataclass(slots=True, eq=False)
class Action:
    """Something done to a session between batches, in its turn among the session's chunks."""

    session: Session
    run: Callable[[], object]
    listeners: list[Callable[[object], None]] = field(default_factory=list)
    outcome: object = None

    def settle(self, outcome: object) -> None:
        self.outcome = outcome
        for listener in self.listeners:
            listener(outcome)


@dataclass(slots=True, eq=False)
class Row:
    """One row of a batch: the next `steps` steps of a chunk, state from row `source`, new state to row `target`."""

    chunk: Chunk
    inputs: Tensors
    steps: int
    source: int
    target: int


Batch = list[Row]

_DIGEST_BYTES: Final = 16


def payload_digest(inputs: Tensors) -> bytes:
    """Tells one payload from another, whatever encoding it came in."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for array in inputs:
        digest.update(array.tobytes())
    return digest.digest()
