"""What the scheduler is told: about the model, and how much work it may take."""

from dataclasses import dataclass

from unroll.bundle import TensorSpec


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """What the scheduler must know of a model. `cuttable`: chunks may be run in pieces; of an output without time the
    last piece's is the answer. `ragged`: rows of different length may share a batch."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cuttable: bool
    ragged: bool


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """max_batch: rows in a batch. max_batch_steps: rows times steps. piece_steps: a longer chunk is run in pieces.
    max_queue: chunks accepted and not yet answered."""

    max_batch: int = 256
    max_batch_steps: int = 2048
    piece_steps: int = 64
    max_queue: int = 8192
