"""The nouns of scheduling: session, chunk, group, action, batch, reply. Records only; the rules are beside them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import numpy as np

from service.core.errors import UnrollError
from service.engine.base import Tensors


@dataclass(slots=True, eq=False)
class Reply:
    """The answer to a chunk. `position`: time steps the session has consumed, this chunk included.

    The outputs may be views into those of a whole batch: who keeps a reply keeps a `copy`.
    """

    outputs: Tensors
    position: int

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.outputs)

    def copy(self) -> "Reply":
        return Reply(tuple(array.copy() for array in self.outputs), self.position)


Outcome = Reply | UnrollError


class Life(StrEnum):
    """The states of a session; `sessions.py` holds the transitions."""

    IDLE = "idle"
    BUSY = "busy"
    LEAVING = "leaving"
    GONE = "gone"

    # Enum's own hash is a Python call, and the transition table is read several times a step.
    __hash__ = str.__hash__


@dataclass(frozen=True, slots=True)
class Applied:
    """A chunk that a session consumed: what a retry of it is recognised and answered by."""

    start: int
    digest: bytes
    reply: Reply


@dataclass(slots=True, eq=False)
class Session:
    """One client's stream.

    slot: its row in the arena. source: the row its next chunk reads, the initial row until the first commit.
    position: steps consumed. expected: the position once all accepted work is done. opened_with: digest of the
    request that opened it at position 0, so that its late duplicate does not open another.
    depth: how many of the last chunks can be asked for again. If the last was a single step, and depth is 1, `stepped`
    is where it began, and `LastSteps` has its payload and its answer; otherwise `applied` has the chunks, latest last.
    """

    id: str
    slot: int
    source: int
    position: int
    expected: int
    last_used: float
    depth: int = 1
    life: Life = Life.IDLE
    stepped: int = -1
    applied: tuple[Applied, ...] = ()
    opened_with: bytes = b""
    active: "Chunk | Group | Action | None" = None
    pending: "list[Chunk | Action] | None" = None

    def queue(self) -> "list[Chunk | Group | Action]":
        """The accepted work, in the order it will run."""
        work = [] if self.active is None else [self.active]
        return [item for item in [*work, *(self.pending or ())] if item.outcome is None]

    def forget_applied(self) -> None:
        """No chunk of the past can be asked for again."""
        self.stepped, self.applied = -1, ()

    def __repr__(self) -> str:
        return f"<Session {self.id} {self.life.value} position={self.position} expected={self.expected}>"


class Chunk:
    """T >= 1 time steps of one session, or one whole stateless sequence (`session` is None).

    inputs: each (time, *shape). pinned: the client said at which position it belongs (`start`). opens: the session
    began with it, and ends if it fails. final: the session closes after it.
    done: steps already run, for a chunk that is run in pieces; its state is then in row `workspace`.
    running: a batch holds it now. abandoned: what it ends with unless that batch completes it.
    listeners: called with the outcome; they must not raise.
    """

    # What most chunks never change is left to the class: one is made for every request.
    done = 0
    workspace: int | None = None
    pieces: list[Tensors] | None = None
    order = 0
    running = False
    abandoned: UnrollError | None = None
    outcome: Outcome | None = None
    listeners: tuple[Callable[[Outcome], None], ...] = ()

    def __init__(
        self,
        inputs: Tensors,
        length: int,
        deadline: float,
        session: Session | None = None,
        start: int = 0,
        pinned: bool = False,
        opens: bool = False,
        final: bool = False,
    ) -> None:
        self.inputs = inputs
        self.length = length
        self.deadline = deadline
        self.session = session
        self.start = start
        self.pinned = pinned
        self.opens = opens
        self.final = final

    def settle(self, outcome: Outcome) -> None:
        self.outcome = outcome
        for listener in self.listeners:
            listener(outcome)


@dataclass(frozen=True, slots=True, eq=False)
class GroupReply:
    """The answer to a group: which rows of the submission it was made of, the positions reached, and the outputs,
    each (len(rows), time, *shape), or (len(rows), *shape) without time.

    errors: by index in `rows`; what outputs hold of a row that failed means nothing.
    """

    rows: list[int]
    positions: list[int]
    outputs: Tensors
    errors: dict[int, UnrollError]


@dataclass(slots=True, eq=False)
class Group:
    """The next T steps of several sessions that were idle: accepted, run and answered as one piece of work.

    inputs: each (len(sessions), time, *shape). rows: which of the submission's rows they are. It is never cancelled:
    a session that is closed meanwhile leaves when the group is done. followers: retries of a row, answered with it.
    """

    sessions: list[Session]
    rows: list[int]
    inputs: Tensors
    length: int
    deadline: float
    then: Callable[[GroupReply], None]
    order: int = 0
    followers: list[tuple[int, Chunk]] = field(default_factory=list)
    outcome: GroupReply | None = None

    def settle(self, reply: GroupReply) -> None:
        self.outcome = reply
        self.then(reply)


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
class Batch:
    """One call of the model. work: chunks, a row each, and groups, in the order of their rows.

    lens, sources, targets: per row, how many steps it runs, from the state in which row, and where the new one goes.
    """

    work: list[Chunk | Group] = field(default_factory=list)
    inputs: Tensors = ()
    lens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lens)

    @property
    def steps(self) -> int:
        return sum(self.lens)


def together(blocks: Sequence[np.ndarray], lens: Sequence[int]) -> np.ndarray:
    """Rows as one array (rows, longest, *shape), short ones padded with zeros.

    blocks: each (time, *shape), the steps of one row or of several, one after another.
    """
    rows, longest = len(lens), max(lens)
    shape = blocks[0].shape[1:]
    if rows * longest == sum(lens):
        flat = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return flat.reshape(rows, longest, *shape)
    padded = np.zeros((rows, longest, *shape), blocks[0].dtype)
    row = 0
    for block in blocks:
        at = 0
        while at < len(block):
            padded[row, : lens[row]] = block[at : at + lens[row]]
            at += lens[row]
            row += 1
    return padded


_DIGEST_BYTES: Final = 16


def payload_digest(inputs: Tensors) -> bytes:
    """Tells one payload from another, whatever encoding it came in."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for array in inputs:
        digest.update(array.tobytes())
    return digest.digest()
