"""The records of sessions: one session, and a cohort of sessions that step together. The rules are in other files."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from unroll.service.core.session_ids import tenant_of
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.recency import Used
from unroll.service.scheduler.reply import AppliedChunk
from unroll.service.store.record import Origin

#: Whom work is for, where several compete: a tenant, without keys the number of a stream, or 0: HTTP without keys.
Owner = str | int


class Work:
    """What is accepted for a session, or for several of them: a chunk, a group or an action.

    length: time steps of each session; 0 for an action. outcome: None until the work is done. owner: looked at only
    where work must wait.
    """

    __slots__ = ()

    length: int
    outcome: object

    @property
    def owner(self) -> Owner:
        raise NotImplementedError

    @property
    def owners(self) -> set[Owner]:
        return {self.owner}

    @property
    def row_count(self) -> int:
        """Rows of a batch that it takes."""
        return 1


class Life(StrEnum):
    """The states of a session; the session table has the transitions. An OPEN session without `active` work is idle."""

    OPEN = "open"
    LEAVING = "leaving"
    GONE = "gone"


#: A member by itself, for code that runs for every row: on Python 3.11, `Life.OPEN` calls a function.
OPEN: Final = Life.OPEN


@dataclass(slots=True, eq=False)
class Durable:
    """The link between a session and its record in the store.

    origin: the session's origin as bytes. token: of the commit that the next commit must follow; empty: none yet.
    stale: the store may have another state, so the session must be looked up before it is used again.
    """

    origin: bytes
    token: bytes = b""
    stale: bool = False


@dataclass(slots=True, eq=False)
class Progress:
    """How far a session is, and its work.

    position: steps consumed. expected: the position once all accepted work is done. last_used: when it last rested.
    active: the work that runs or is ready. pending: the work after that, None if there is none.
    """

    position: int
    expected: int
    last_used: float
    active: Work | None = None
    pending: list[Work] | None = None

    def queue(self) -> list[Work]:
        """The accepted work, in the order it will run."""
        work = [] if self.active is None else [self.active]
        return [item for item in [*work, *(self.pending or ())] if item.outcome is None]


@dataclass(slots=True, eq=False)
class Session(Used):
    """One client's stream.

    slot: its row in the arena. source: the row its next chunk reads; the initial row until the first chunk is applied.
    progress: its own; None while it is part of `cohort`, which has one for all of its sessions.
    depth: how many chunks its client may have in flight on a stream, and so how many of its last chunks can be retried.
    applied: those chunks, latest last; None: the last was a single step, the depth is 1, and the replay cache has the
    step in its table.
    opened_with: digest of the request that opened it at position 0, so that its late duplicate opens no other session.
    origin: the first part of its record, once it has one. durable: the link to the store; None: a memory session.
    stream: the number of the stream that it was last bound to; 0: none yet.
    """

    id: str
    slot: int
    source: int
    progress: Progress | None
    depth: int = 1
    life: Life = Life.OPEN
    applied: tuple[AppliedChunk, ...] | None = ()
    opened_with: bytes = b""
    cohort: "Cohort | None" = None
    origin: Origin | None = None
    durable: Durable | None = None
    stream: int = 0

    @property
    def owner(self) -> Owner:
        return tenant_of(self.id) or self.stream

    @property
    def own_progress(self) -> Progress:
        """Raises RuntimeError while a cohort has it: no stale position can be read. `detach_from_cohort` first."""
        if self.progress is None:
            raise RuntimeError(f"{self!r} has no progress of its own")
        return self.progress

    @property
    def position(self) -> int:
        return self.own_progress.position

    @property
    def expected(self) -> int:
        return self.own_progress.expected

    @property
    def last_used(self) -> float:
        return self.own_progress.last_used

    @property
    def active(self) -> Work | None:
        return self.own_progress.active

    def __repr__(self) -> str:
        if self.progress is None:
            return f"<Session {self.id} in {self.cohort!r}>"
        life = self.life.value if self.life is not Life.OPEN else "idle" if self.active is None else "busy"
        return f"<Session {self.id} {life} position={self.position} expected={self.expected}>"


@dataclass(slots=True, eq=False)
class Cohort(Used):
    """Open sessions that take single steps together, time after time: one record instead of one for each of them.

    slots: their rows in the arena, which hold their states. positions: steps consumed, uint64. active: the step that
    runs or waits; the sessions have no other work. last: inputs and outputs of the step before, which go to the step
    table when the cohort is dissolved; None if they are there already. formed: false once the cohort is dissolved.
    The other fields of each session stay as they were when the cohort was formed.
    """

    sessions: list[Session]
    slots: np.ndarray
    positions: np.ndarray
    last_used: float
    active: Work | None = None
    last: tuple[Tensors, Tensors] | None = None
    formed: bool = True

    def __repr__(self) -> str:
        return f"<Cohort of {len(self.sessions)} {'idle' if self.active is None else 'busy'}>"
