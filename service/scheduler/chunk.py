"""Kinds of work: chunks, single steps, groups and actions; also pending commits."""

import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from unroll.service.core.errors import Cancelled, UnrollError
from unroll.service.core.session_ids import tenant_of
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.reply import Outcome
from unroll.service.scheduler.session import Cohort, Owner, Session, Work
from unroll.service.store.record import Origin


@dataclass(frozen=True, slots=True)
class Opening:
    """The session that a chunk opens.

    origin: the origin of a durable session, None for a memory session. token: the token of the stored record that the
    new session replaces.
    """

    session_id: str
    origin: Origin | None = None
    token: bytes = b""


class Chunk(Work):
    """One or more time steps of one session, or a stateless sequence.

    Attributes:
        inputs: Each (time, *shape).
        session: None for a stateless sequence, and until the chunk has opened its session.
        start: Position of the first step.
        pinned: The client specified `start`.
        final: The chunk closes its session.
        opening: The session that this chunk opens; it is closed again if the chunk fails.
        state_row: (state_size,). Before the run: initial state of a stateless sequence, None for the model's own.
            Afterwards: its final state.
        tenant: Tenant of a stateless sequence; empty without keys.
        patient: An overload is no reason to refuse the chunk.
        deadline: Time by which the chunk must start.
        done, pieces: For a chunk that runs in pieces: steps that have run, and their outputs.
        keeps_workspace: The chunk needs an arena row of its own from its first batch on, because it has a `state_row`
            or runs in pieces among short chunks.
        workspace: Arena row that holds the state between pieces.
        running: The chunk is in a running batch, or its commit is pending.
        abandoned: Error to fail with, unless the running batch or commit completes the chunk.
        listeners: Called with the outcome; must not raise.
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
        """Whether it is waiting and has run no step."""
        return self.outcome is None and self.done == 0

    @property
    def may_be_shed(self) -> bool:
        """Whether an overload is a reason to refuse it."""
        return self.is_new and not self.patient

    @property
    def owner(self) -> Owner:
        if self.session is not None:
            return self.session.owner
        return (self.tenant if self.opening is None else tenant_of(self.opening.session_id)) or 0

    def prepare_next(self) -> UnrollError | None:
        """Called between two pieces. Returns an error to end the chunk early."""
        return None

    def answer(self, outcome: Outcome) -> None:
        self.outcome = outcome
        for listener in self.listeners:
            listener(outcome)


class StepListener(Protocol):
    """Receives the outcome of a step. Its methods must not raise.

    patient: An overload is no reason to refuse the step.
    """

    patient: bool

    @property
    def write(self) -> Callable[[Tensors], Sequence[Any]]:
        """Encodes a group's outputs, one element per row. Called once for all listeners with the same function."""

    def complete(self, written: Any, position: int) -> None:
        """The step ran. written: the row's element from `write`. position: The session's, after the step."""

    def fail(self, error: UnrollError) -> None: ...


class Step(Chunk):
    """A single step of a session without other work; the steps that a batch takes run as one group.

    Attributes:
        inputs: Set only when a retry is compared with them.
        values: The inputs, concatenated.
        followers: Retries, answered together with the step.
    """

    length = 1
    pinned = False

    def __init__(
        self,
        session: Session,
        values: bytes,
        now: float,
        deadline: float,
        listener: StepListener,
        opening: Opening | None,
        final: bool,
    ) -> None:
        self.session: Session = session
        self.values = values
        self.ready_at = now
        self.deadline = deadline
        self.listener = listener
        self.opening = opening
        self.final = final
        self.followers: tuple[Chunk, ...] = ()
        self.outcome: Outcome | None = None  # not left to the class, because it is read for every step

    @property
    def may_be_shed(self) -> bool:
        return self.outcome is None and not self.listener.patient

    def answer(self, outcome: Outcome) -> None:
        """Answer the step with an error; its group answers it with a reply."""
        assert isinstance(outcome, UnrollError)
        self.outcome = outcome
        if not isinstance(outcome, Cancelled):  # its client is gone
            self.listener.fail(outcome)
        for follower in self.followers:
            follower.answer(outcome)


@dataclass(frozen=True, slots=True, eq=False)
class GroupReply:
    """The answer to a group.

    Attributes:
        rows: Rows of the submission that the group covers.
        positions: New position of each row, uint64.
        outputs: Each (rows, time, *shape), or (rows, *shape) without time. Those of failed rows are undefined.
        errors: By index in `rows`.
        cohort: The cohort that the sessions now form, if they are expected to step together again.
        kept: False if there was no room to keep the reply of some row for retries.
    """

    rows: list[int] | slice
    positions: np.ndarray
    outputs: Tensors
    errors: dict[int, UnrollError]
    cohort: Cohort | None = None
    kept: bool = True


@dataclass(slots=True, eq=False)
class Group(Work):
    """The next T steps of several idle sessions, accepted, run and answered as a unit.

    A group is never cancelled. A session that is closed stays until the group is done.

    Attributes:
        inputs: Each (len(sessions), time, *shape).
        rows: Rows of the submission that the group covers.
        cohort: The sessions' cohort at submission, if they form one.
        again: The sessions are expected to step together again.
        is_durable: Whether the sessions are durable: either all or none.
        followed: A session was closed or has further work.
        followers: Retries as (row, chunk), answered together with that row.
        opened: Sessions that the group opened; each is closed again if its row fails.
        ending: Sessions that are closed once their row is applied.
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
    opened: AbstractSet[Session] = frozenset()
    ending: AbstractSet[Session] = frozenset()

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
    """A function that runs between batches, in order with the session's chunks."""

    session: Session
    run: Callable[[], object]
    listeners: list[Callable[[object], None]] = field(default_factory=list)
    outcome: object = None
    length: int = 0

    def answer(self, outcome: object) -> None:
        self.outcome = outcome
        for listener in self.listeners:
            listener(outcome)


#: Work of durable sessions that has run but is not applied until the store has it: the work, its outputs, and the
#: errors of a group's failed rows.
PendingCommit = tuple[Chunk | Group, Tensors, dict[int, UnrollError]]
