"""Example inputs for models described on the command line."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unroll.export.errors import ExportError
from unroll.export.loading.input_specs import InputSpec, StateSpec
from unroll.export.signature.outputs import DTYPES

Example = dict[str, Any]

_DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPES.items()}
_BATCH, _TIME = 2, 16


def examples(inputs: Sequence[InputSpec], static: Sequence[InputSpec] = (), state: Sequence[StateSpec] = ()) -> Example:
    """Example arguments of forward by name. Raises ExportError(input) if no inputs are described."""
    if not inputs:
        raise ExportError("input", "no inputs: describe the arguments of forward with --input NAME:DTYPE:SHAPE")
    fixed = {spec.name: example(spec)[:, 0] for spec in static}
    return {spec.name: example(spec) for spec in inputs} | fixed | _initial(state, _BATCH)


def step_examples(
    inputs: Sequence[InputSpec], static: Sequence[InputSpec] = (), state: Sequence[StateSpec] = ()
) -> Example:
    """The same for a forward that computes one time step, (batch, ...). Raises ExportError(input)."""
    sequences = examples(inputs, static)
    rows = _BATCH * _TIME
    once = {spec.name for spec in static}
    return {
        name: value.repeat_interleave(_TIME, 0) if name in once else value.flatten(0, 1)
        for name, value in sequences.items()
    } | _initial(state, rows)


def _initial(state: Sequence[StateSpec], batch: int) -> Example:
    """Zeros for each state; a tuple if it has several parts."""

    def zeros(spec: InputSpec, axis: int) -> Tensor:
        return torch.zeros((*spec.shape[:axis], batch, *spec.shape[axis:]), dtype=_DTYPES[spec.dtype])

    made = {spec.name: tuple(zeros(*part) for part in spec.parts) for spec in state if spec.parts}
    return {name: parts[0] if len(parts) == 1 else parts for name, parts in made.items()}


def example(spec: InputSpec) -> Tensor:
    """An input (batch, time, *shape): standard normal floats, or 0 and 1 for integers, since their limit is unknown."""
    size = (_BATCH, _TIME, *spec.shape)
    random = torch.Generator().manual_seed(0)
    dtype = _DTYPES[spec.dtype]
    if dtype.is_floating_point:
        return torch.randn(size, generator=random)
    return torch.randint(0, 2, size, generator=random).to(dtype)


def token_example(vocabulary: int) -> Tensor:
    """Random token ids (batch, time) below `vocabulary`."""
    return torch.randint(0, vocabulary, (_BATCH, _TIME))
