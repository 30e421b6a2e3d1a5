"""The model properties that the scheduler uses, and its limits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from unroll.bundle import TensorSpec
from unroll.service.core.errors import UnrollError
from unroll.service.engine.engine import Tensors


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """Model properties that affect scheduling.

    cuttable: chunks may run in pieces; an output without time takes its value from the last piece. ragged: a batch may
    mix rows of different lengths. faults: returns the errors of rows with invalid values, from the inputs of single
    steps, each (rows, 1, *shape).
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cuttable: bool
    ragged: bool
    faults: Callable[[Tensors], Mapping[int, UnrollError]] = lambda inputs: {}


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Limits of batches and of the queue.

    Attributes:
        max_batch: Rows per batch.
        max_batch_steps: Rows times steps per batch.
        piece_steps: Longer chunks run in pieces.
        max_queue: Chunks accepted and not yet answered.
        overload_wait: Seconds that new work may wait during an overload; 0: until its deadline.
    """

    max_batch: int = 256
    max_batch_steps: int = 2048
    piece_steps: int = 64
    max_queue: int = 8192
    overload_wait: float = 0.02


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Limits of sessions, per model.

    Attributes:
        capacity: Number of open sessions.
        idle_timeout: Seconds; None keeps idle sessions forever.
        tombstone_life: Seconds for which a tombstone is kept.
        tombstones: Number of tombstones.
        duplicates_life: Seconds after a session's end during which a repeated opening request is recognised.
        closing_reply_bytes: Total size of the replies kept for retries of chunks that closed sessions.
        reply_bytes: Total size of the replies kept for other retries, except small single steps, which have a table.
    """

    capacity: int = 65_536
    idle_timeout: float | None = 900.0
    tombstone_life: float = 3600.0
    tombstones: int = 262_144
    duplicates_life: float = 60.0
    closing_reply_bytes: int = 64 * 2**20
    reply_bytes: int = 256 * 2**20
