"""The records of work: a chunk of one session, a group of many sessions' steps, an action, and a pending commit."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from unroll.service.core.errors import UnrollError
from unroll.service.core.session_ids import tenant_of
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.reply import Outcome
from unroll.service.scheduler.session import Cohort, Owner, Session, Work
from unroll.service.store.record import Origin


@dataclass(frozen=True, slots=True)
class Opening:
    """The session that a chunk opens.

    origin: of a durable session; None: a memory session. token: of the record in the store that it takes the place of.
    """

    session_id: str
    origin: Origin | None = None
    token: bytes = b""


class Chunk(Work):
    """One or more time steps of one session, or a stateless sequence.

    inputs: each (time, *shape). session: None for a stateless sequence, and before the chunk has opened its session.
    start: the position of the first step. pinned: the client named that position. final: the session closes with it.
    opening: the session that begins with this chunk, and that ends if the chunk fails.
    state_row: (state_size,), the state a stateless sequence begins with, None for the initial state; afterwards the
    state it led to.
    tenant: whose stateless sequence it is; empty without keys. patient: it is not refused because of an overload.
    deadline: when it must have begun. done: steps that have run, of a chunk that runs in pieces. pieces: their outputs.
    keeps_workspace: it needs an arena row of its own from its first batch on, because it brings its state or runs in
    pieces among short chunks. workspace: the arena row of its state between pieces. running: a batch has it now, or the
    store. abandoned: the error it fails with unless that completes it. listeners: called with the outcome; they must
    not raise.
    """

    # Defaults stay in the class, because a chunk is created for every request and most never change them.
    tenant = ""
    patient = False
    deadline = math.inf
    opening: Opening | None = None
    done = 0
    keeps_workspace = False
    workspace: int | None = None
    state_row: np.ndarray | None = None
    pieces: list[Tensors] | None = None
    ready_at = 0.0
    running = False
    abandoned: UnrollError | None = None
    outcome: Outcome | None = None
    listeners: tuple[Callable[[Outcome], None], ...] = ()

    def __init__(
        self,
        inputs: Tensors,
        session: Session | None = None,
        position: int | None = None,
        *,
        final: bool = False,
        opening: Opening | None = None,
        state_row: np.ndarray | None = None,
    ) -> None:
        self.inputs = inputs
        self.length = len(inputs[0])
        self.session = session
        self.start = position or 0
        self.pinned = position is not None
        self.final = final
        if opening is not None:
            self.opening = opening
        if state_row is not None:
            self.state_row = state_row
            self.keeps_workspace = True

    @property
    def is_new(self) -> bool:
        """It waits, and nothing of it has run."""
        return self.outcome is None and self.done == 0

    @property
    def owner(self) -> Owner:
        if self.session is not None:
            return self.session.owner
        return (self.tenant if self.opening is None else tenant_of(self.opening.session_id)) or 0

    def prepare_next(self) -> UnrollError | None:
        """A piece of the chunk has run, and more are to come. Returns the error that ends it instead."""
        return None

    def answer(self, outcome: Outcome) -> None:
        self.outcome = outcome
        for listener in self.listeners:
            listener(outcome)


@dataclass(frozen=True, slots=True, eq=False)
class GroupReply:
    """The answer to a group.

    rows: the rows of the submission that the group was made of. positions: reached by each, uint64.
    outputs: each (rows, time, *shape), or (rows, *shape) without time. errors: by index in `rows`; the outputs of a row
    that failed mean nothing. cohort: the cohort that the sessions have become, if they will step together again.
    kept: false if there was no room to keep the reply of some row.
    """

    rows: list[int] | slice
    positions: np.ndarray
    outputs: Tensors
    errors: dict[int, UnrollError]
    cohort: Cohort | None = None
    kept: bool = True


@dataclass(slots=True, eq=False)
class Group(Work):
    """The next T steps of several sessions that were idle: accepted, run and answered as one piece of work.

    inputs: each (len(sessions), time, *shape). rows: the rows of the submission that it is made of. A group is never
    cancelled: a session that is closed before the group is done stays until then. followed: one of the sessions was
    closed, or has more work now. followers: retries of a row, answered with it. cohort: of its sessions, when it was
    submitted. again: the sessions will probably step together again. is_durable: all of the sessions are, or none.
    """

    sessions: list[Session]
    rows: list[int] | slice
    inputs: Tensors
    length: int
    deadline: float
    then: Callable[[GroupReply], None]
    cohort: Cohort | None = None
    again: bool = False
    is_durable: bool = False
    ready_at: float = 0.0
    followed: bool = False
    followers: list[tuple[int, Chunk]] = field(default_factory=list)
    outcome: GroupReply | None = None

    @property
    def owner(self) -> Owner:
        return self.sessions[0].owner

    @property
    def row_count(self) -> int:
        return len(self.sessions)

    def inputs_of(self, row: int) -> Tensors:
        return tuple([array[row, ...] for array in self.inputs])

    def answer(self, reply: GroupReply) -> None:
        self.outcome = reply
        self.then(reply)


@dataclass(slots=True, eq=False)
class Action(Work):
    """A function that runs between batches, in its turn among the session's chunks."""

    session: Session
    run: Callable[[], object]
    listeners: list[Callable[[object], None]] = field(default_factory=list)
    outcome: object = None
    length: int = 0

    def answer(self, outcome: object) -> None:
        self.outcome = outcome
        for listener in self.listeners:
            listener(outcome)


#: Work of durable sessions that has run, its outputs, and the errors of a group's rows that failed. It counts as
#: applied only once the store has it.
PendingCommit = tuple[Chunk | Group, Tensors, dict[int, UnrollError]]
