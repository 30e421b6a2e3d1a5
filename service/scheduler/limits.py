"""What the scheduler knows of a model, and its limits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from unroll.bundle import TensorSpec
from unroll.service.core.errors import UnrollError
from unroll.service.engine.engine import Tensors


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """The properties of a model that scheduling depends on.

    cuttable: chunks may run in pieces; an output without time has its value from the last piece. ragged: rows of
    different length may share a batch. faults: returns the errors in the values of single steps, by row; inputs: each
    (rows, 1, *shape).
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cuttable: bool
    ragged: bool
    faults: Callable[[Tensors], Mapping[int, UnrollError]] = lambda inputs: {}


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """max_batch: rows in a batch. max_batch_steps: rows times steps. piece_steps: a longer chunk runs in pieces.
    max_queue: chunks accepted and not yet answered. overload_wait: seconds that new work may wait while more arrives
    than runs; 0: as long as its deadline allows."""

    max_batch: int = 256
    max_batch_steps: int = 2048
    piece_steps: int = 64
    max_queue: int = 8192
    overload_wait: float = 0.02


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """capacity: sessions at once. idle_timeout: seconds; None keeps idle sessions for ever.

    tombstone_life: seconds for which the end of a session is remembered. tombstones: number of remembered ends.
    duplicates_life: seconds after a session's end in which a repeat of the request that opened it is recognised.
    closing_reply_bytes: of the replies kept for retries of chunks that closed sessions.
    reply_bytes: of the replies kept for retries of other chunks; single small steps have rows of their own.
    """

    capacity: int = 65_536
    idle_timeout: float | None = 900.0
    tombstone_life: float = 3600.0
    tombstones: int = 262_144
    duplicates_life: float = 60.0
    closing_reply_bytes: int = 64 * 2**20
    reply_bytes: int = 256 * 2**20
