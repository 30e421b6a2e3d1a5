"""The nouns of scheduling: session, cohort, chunk, group, action, batch, reply, result. Records only, the rules are
beside."""

import hashlib
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Self

import numpy as np

from unroll.service.core.errors import UnrollError
from unroll.service.engine.interface import Tensors
from unroll.service.scheduler.recency import Used
from unroll.service.store.record import Origin


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

#: Rows of the arena. A batch writes where it reads if it is given one object for both.
Indices = list[int] | np.ndarray


class Life(StrEnum):
    """The states of a session; `sessions.py` holds the transitions. While OPEN it is idle if no work is `active`."""

    OPEN = "open"
    LEAVING = "leaving"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Applied:
    """A chunk that a session consumed: what a retry of it is recognised and answered by."""

    start: int
    digest: bytes
    reply: Reply


@dataclass(slots=True, eq=False)
class Durable:
    """What ties a session to its record in the store.

    origin: the session's, as bytes. token: of the commit that its next is to follow; empty: there is none. stale: what
    is here may not be what the store has, and is to be looked up before it is used again.
    """

    origin: bytes
    token: bytes = b""
    stale: bool = False


@dataclass(slots=True, eq=False)
class Session(Used):
    """One client's stream.

    slot: its row in the arena. source: the row its next chunk reads, the initial row until the first commit.
    position: steps consumed. expected: the position once all accepted work is done. opened_with: digest of the
    request that opened it at position 0, so that its late duplicate does not open another.
    depth: how many of the last chunks can be asked for again. If the last was a single step, and depth is 1, `stepped`
    says so, and `LastSteps` has its payload and its answer; otherwise `applied` has the chunks, latest last.
    origin: what its record begins with, once it has one. durable: its state is the store's, and this a copy; None: this
    is all there is of it.
    cohort: it is part of that, and has no `position`, `expected`, `last_used` and `active` of its own meanwhile: who
    reads them without asking for the session first gets an AttributeError, and not what was true once.
    """

    id: str
    slot: int
    source: int
    position: int
    expected: int
    last_used: float
    depth: int = 1
    life: Life = Life.OPEN
    stepped: bool = False
    applied: tuple[Applied, ...] = ()
    opened_with: bytes = b""
    cohort: "Cohort | None" = None
    origin: Origin | None = None
    durable: Durable | None = None
    active: "Chunk | Group | Action | None" = None
    pending: "list[Chunk | Action] | None" = None

    def queue(self) -> "list[Chunk | Group | Action]":
        """The accepted work, in the order it will run."""
        work = [] if self.active is None else [self.active]
        return [item for item in [*work, *(self.pending or ())] if item.outcome is None]

    def forget_applied(self) -> None:
        """No chunk of the past can be asked for again."""
        self.stepped, self.applied = False, ()

    def __repr__(self) -> str:
        if self.cohort is not None:
            return f"<Session {self.id} in {self.cohort!r}>"
        life = self.life.value if self.life is not Life.OPEN else "idle" if self.active is None else "busy"
        return f"<Session {self.id} {life} position={self.position} expected={self.expected}>"


@dataclass(slots=True, eq=False)
class Cohort(Used):
    """Open sessions that take single steps together, time after time: one record, until one of them is looked at.

    slots: their rows in the arena, which hold their states. positions: steps consumed, uint64. active: the step that
    is under way; they have no other work. last: inputs and outputs of the step before, for `LastSteps` when the cohort
    ends; None if it has them. What a session has besides stays as it was when the cohort was formed, its depth of 1
    included. formed: nobody looked at one of them so far.
    """

    sessions: list[Session]
    slots: np.ndarray
    positions: np.ndarray
    last_used: float
    active: "Group | None" = None
    last: tuple[Tensors, Tensors] | None = None
    formed: bool = True

    def __repr__(self) -> str:
        return f"<Cohort of {len(self.sessions)} {'idle' if self.active is None else 'busy'}>"


class Chunk:
    """T >= 1 time steps of one session, or a stateless sequence (`session` is None): a whole one, from the initial
    state, or one from the state in `row` (state_size,), which is the state after it once it was run.

    inputs: each (time, *shape). pinned: the client said at which position it belongs (`start`). opens: the session
    began with it, and ends if it fails. final: the session closes after it.
    done: steps already run, for a chunk that is run in pieces; its state is then in row `workspace`.
    running: a batch holds it now. abandoned: what it ends with unless that batch completes it.
    listeners: called with the outcome; they must not raise.
    """

    # What most chunks never change is left to the class: one is made for every request.
    done = 0
    workspace: int | None = None
    row: np.ndarray | None = None
    pieces: list[Tensors] | None = None
    order = 0
    ready_at = 0.0
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
class Result:
    """What the model made of the chunk of a durable session. Until it is in the store, it is as if it were not."""

    chunk: Chunk
    session: Session
    outputs: Tensors


@dataclass(frozen=True, slots=True, eq=False)
class GroupReply:
    """The answer to a group: which rows of the submission it was made of, the positions reached, uint64, and the
    outputs, each (rows, time, *shape), or (rows, *shape) without time.

    errors: by index in `rows`; what outputs hold of a row that failed means nothing. cohort: what the sessions have
    become, if they are to step together again.
    """

    rows: "list[int] | slice"
    positions: np.ndarray
    outputs: Tensors
    errors: dict[int, UnrollError]
    cohort: Cohort | None = None


@dataclass(slots=True, eq=False)
class Group:
    """The next T steps of several sessions that were idle: accepted, run and answered as one piece of work.

    inputs: each (len(sessions), time, *shape). rows: which of the submission's rows they are. It is never cancelled:
    a session that is closed meanwhile leaves when the group is done. followed: one of the sessions was closed, or has
    more work by now. followers: retries of a row, answered with it. cohort: the sessions', if they were one when the
    group was submitted. again: they will come together again, most likely.
    """

    sessions: list[Session]
    rows: "list[int] | slice"
    inputs: Tensors
    length: int
    deadline: float
    then: Callable[[GroupReply], None]
    cohort: Cohort | None = None
    again: bool = False
    order: int = 0
    ready_at: float = 0.0
    followed: bool = False
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


class Batch:
    """One call of the model: rows that are added one piece of work after another, and then `seal`ed.

    work: chunks, a row each, and groups, in the order of their rows. lens: steps of each row. sources, targets: rows of
    the arena that each reads its state from and writes the new one to. brought: states to be put into rows before it
    runs. held: chunks whose state is to be fetched from their row when it has. steps: of all rows together. longest: of
    a row. waited: seconds that the work waited for its turn, all rows together.
    """

    def __init__(self) -> None:
        self.work: list[Chunk | Group] = []
        self.brought: list[tuple[int, np.ndarray]] = []
        self.held: list[Chunk] = []
        self.lens: list[int] = []
        self.steps = self.longest = 0
        self.waited = 0.0
        self._sources: list[Indices] = []
        self._targets: list[Indices] = []
        self._blocks: list[Tensors] = []

    def __len__(self) -> int:
        return len(self.lens)

    def add(self, work: Chunk | Group, block: Tensors, length: int, sources: Indices, targets: Indices) -> None:
        """block: each input of these rows, `length` steps of each, one row after another: (all steps, *shape)."""
        rows = len(targets)
        self.work.append(work)
        self.lens += [length] * rows
        self.steps += length * rows
        self.longest = max(self.longest, length)
        self._sources.append(sources)
        self._targets.append(targets)
        self._blocks.append(block)

    def seal(self, now: float) -> Self:
        """Make arrays of what was added; afterwards the batch can be run."""
        for work in self.work:
            self.waited += (now - work.ready_at) * (len(work.sessions) if isinstance(work, Group) else 1)
        self.inputs = tuple([together(blocks, self.lens, self.longest) for blocks in zip(*self._blocks, strict=True)])
        self.targets = _indices(self._targets, len(self))
        same = all(map(operator.is_, self._sources, self._targets))
        self.sources = self.targets if same else _indices(self._sources, len(self))
        return self


def _indices(parts: list[Indices], count: int) -> np.ndarray:
    if len(parts) == 1:
        return np.asarray(parts[0], np.intp)
    return np.fromiter(itertools.chain.from_iterable(parts), np.intp, count)


def together(blocks: Sequence[np.ndarray], lens: Sequence[int], longest: int) -> np.ndarray:
    """Rows as one array (rows, longest, *shape), short ones padded with zeros.

    blocks: each (time, *shape), the steps of one row or of several, one after another.
    """
    rows, shape = len(lens), blocks[0].shape[1:]
    flat = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    if rows * longest == len(flat):
        return flat.reshape(rows, longest, *shape)
    padded = np.zeros((rows, longest, *shape), blocks[0].dtype)
    begin = 0
    for row, steps in enumerate(lens):
        padded[row, :steps] = flat[begin : begin + steps]
        begin += steps
    return padded


_DIGEST_BYTES: Final = 16


def payload_digest(inputs: Tensors) -> bytes:
    """Tells one payload from another, whatever encoding it came in."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for array in inputs:
        digest.update(array.tobytes())
    return digest.digest()
