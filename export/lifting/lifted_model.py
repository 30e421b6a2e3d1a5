"""A lifted model in both precisions, with inputs to run it."""

from dataclasses import dataclass

from unroll.export.lifting.streaming import StreamingModule
from unroll.export.signature.samples import Samples


@dataclass(frozen=True, slots=True)
class LiftedModel:
    """The user's model as a function of the state row.

    Attributes:
        single: the model in float32, which is exported.
        double: the model in float64, the reference.
        samples: inputs of any size for both.
    """

    single: StreamingModule
    double: StreamingModule
    samples: Samples
