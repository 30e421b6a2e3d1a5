"""Example inputs for a model that the command line describes, made of `NAME:DTYPE:SHAPE`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from unroll.export.errors import ExportError
from unroll.export.signature.outputs import DTYPES

Example = dict[str, Tensor]

_DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPES.items()}
_BATCH, _TIME = 2, 16


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One `--input`: an argument of forward, and what one time step of it holds."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """`NAME:DTYPE:SHAPE`, such as `x:float32:64`, `grid:float32:8x3` or `token:int64:`."""
        try:
            name, dtype, shape = text.split(":")
            sizes = tuple(int(size) for size in shape.split("x")) if shape else ()
            if not name.isidentifier() or any(size < 1 for size in sizes):
                raise ValueError
            return cls(name, _DTYPES[dtype], sizes)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not NAME:DTYPE:SHAPE (DTYPE: {', '.join(_DTYPES)}; SHAPE such as 64, 8x3 or empty)"
            ) from None

    def example(self) -> Tensor:
        """(batch, time, *shape): standard normal floats; 0 and 1 for integers, whose limit is not known yet."""
        size = (_BATCH, _TIME, *self.shape)
        random = torch.Generator().manual_seed(0)
        if self.dtype.is_floating_point:
            return torch.randn(size, generator=random)
        return torch.randint(0, 2, size, generator=random).to(self.dtype)


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One `--state`: an argument that forward hands on itself, what a row of it holds, and the output it becomes."""

    input: InputSpec
    output: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """`NAME:DTYPE:SHAPE=OUTPUT`, such as `cache:float32:2x64=y1`."""
        spec, equals, output = text.partition("=")
        if not equals or not output:
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME:DTYPE:SHAPE=OUTPUT")
        return cls(InputSpec.parse(spec), output)

    def example(self) -> Tensor:
        """(batch, *shape) zeros."""
        return torch.zeros(_BATCH, *self.input.shape, dtype=self.input.dtype)


def examples(inputs: Sequence[InputSpec], static: Sequence[InputSpec] = (), state: Sequence[StateSpec] = ()) -> Example:
    if not inputs:
        raise ExportError("input", "no inputs: describe the arguments of forward with --input NAME:DTYPE:SHAPE")
    found = {spec.name: spec.example() for spec in inputs} | {spec.name: spec.example()[:, 0] for spec in static}
    return found | {spec.input.name: spec.example() for spec in state}


def token_example(vocabulary: int) -> Tensor:
    """(batch, time) random token ids below `vocabulary`."""
    return torch.randint(0, vocabulary, (_BATCH, _TIME))
