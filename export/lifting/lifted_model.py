"""A lifted model in both precisions, and inputs to run it with."""

from dataclasses import dataclass

from unroll.export.lifting.streaming import StreamingModule
from unroll.export.signature.samples import Samples


@dataclass(frozen=True, slots=True)
class LiftedModel:
    """The user's model as a function of the state row.

    Attributes:
        single: in float32, as it is exported.
        double: in float64, the reference.
        samples: inputs of any size for both.
    """

    single: StreamingModule
    double: StreamingModule
    samples: Samples
