"""Example inputs for a model that the command line describes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unroll.export.errors import ExportError
from unroll.export.loading.input_specs import InputSpec, StateSpec
from unroll.export.signature.outputs import DTYPES

Example = dict[str, Tensor]

_DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPES.items()}
_BATCH, _TIME = 2, 16


def examples(inputs: Sequence[InputSpec], static: Sequence[InputSpec] = (), state: Sequence[StateSpec] = ()) -> Example:
    """By the names of forward's arguments. Raises ExportError(input) if no inputs are described."""
    if not inputs:
        raise ExportError("input", "no inputs: describe the arguments of forward with --input NAME:DTYPE:SHAPE")
    return (
        {spec.name: example(spec) for spec in inputs}
        | {spec.name: example(spec)[:, 0] for spec in static}
        | {spec.input.name: torch.zeros(_BATCH, *spec.input.shape, dtype=_DTYPES[spec.input.dtype]) for spec in state}
    )


def example(spec: InputSpec) -> Tensor:
    """(batch, time, *shape): standard normal floats; 0 and 1 for integers, whose limit is not known yet."""
    size = (_BATCH, _TIME, *spec.shape)
    random = torch.Generator().manual_seed(0)
    dtype = _DTYPES[spec.dtype]
    if dtype.is_floating_point:
        return torch.randn(size, generator=random)
    return torch.randint(0, 2, size, generator=random).to(dtype)


def token_example(vocabulary: int) -> Tensor:
    """(batch, time) random token ids below `vocabulary`."""
    return torch.randint(0, vocabulary, (_BATCH, _TIME))
