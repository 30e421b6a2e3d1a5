"""Sessions and cohorts as data. The rules are in other files."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from unroll.service.core.session_ids import tenant_of
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.recency import Used
from unroll.service.store.record import Kept, Origin

#: The unit of fairness between clients: a tenant; without keys, the number of a stream, or 0 for HTTP.
Owner = str | int


class Work:
    """Accepted work of one or several sessions: a chunk, a group or an action.

    length: time steps per session; 0 for an action. outcome: None until the work is done. owner: read only when work
    has to wait.
    """

    __slots__ = ()

    length: int
    outcome: object

    @property
    def owner(self) -> Owner:
        raise NotImplementedError

    @property
    def row_count(self) -> int:
        """Rows that it occupies in a batch."""
        return 1


class Life(StrEnum):
    """States of a session. An OPEN session without `active` work is idle. `session_table.py` has the transitions."""

    OPEN = "open"
    LEAVING = "leaving"
    GONE = "gone"


#: For code that runs once per row: on Python 3.11, `Life.OPEN` calls a function.
OPEN: Final = Life.OPEN


@dataclass(slots=True, eq=False)
class Durable:
    """The link between a session and its record in the store.

    Attributes:
        token: Token of the last commit, which the next commit must name; empty before the first.
        stale: The store may have another state, so the session must be looked up before its next use.
        checks: Before how many of the next steps to compare the copy with the store, if that is possible at once. Not 0
            if another replica has updated the session recently.
    """

    origin: bytes
    token: bytes = b""
    stale: bool = False
    checks: int = 0


@dataclass(slots=True, eq=False)
class Progress:
    """A session's position and its queue.

    Attributes:
        position: Steps consumed.
        expected: Position after all accepted work.
        last_used: When the session last became idle.
        active: Work that is running or ready.
        pending: Work queued behind `active`; None if there is none.
    """

    position: int
    expected: int
    last_used: float
    active: Work | None = None
    pending: list[Work] | None = None

    def queue(self) -> list[Work]:
        """The accepted work, in execution order."""
        work = [] if self.active is None else [self.active]
        return [item for item in [*work, *(self.pending or ())] if item.outcome is None]


@dataclass(slots=True, eq=False)
class Session(Used):
    """One client's session.

    Attributes:
        source: The row that its next chunk reads: the initial row until the first chunk is applied, then `slot`.
        progress: None while the session is in a `cohort`, which tracks progress for all its sessions.
        depth: How many chunks a stream may have in flight for the session, and so how many are kept for retries.
        applied: The kept chunks, latest last. None if `depth` is 1 and the last chunk was a single step, which the
            replay cache has in its table.
        opened_with: Digest of the request that opened it at position 0. A late duplicate must not open it again.
        origin: The first part of the record, once there is one.
        durable: The link to the store; None for a memory session.
        stream: Number of the stream that it was last bound to; 0 if none.
    """

    id: str
    slot: int
    source: int
    progress: Progress | None
    depth: int = 1
    life: Life = Life.OPEN
    applied: tuple[Kept, ...] | None = ()
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
        """Raises RuntimeError while the session is in a cohort, where its progress is stale; detach it first."""
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
    """Open sessions that repeatedly take single steps together, tracked as one.

    The sessions' other fields stay as they were when the cohort was formed.

    Attributes:
        positions: Steps consumed by each, uint64.
        active: The step that is running or waiting; the sessions have no other work.
        last: Inputs and outputs of the last step, which go to the step table when the cohort is dissolved; None if they
            are there already.
        formed: False once the cohort is dissolved.
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
