"""Loads what the command line names: a module, its weights, and example inputs for it."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn

from unroll.export.errors import ExportError, first_line
from unroll.export.signature.outputs import DTYPES
from unroll.models.checkpoint import CheckpointError
from unroll.models.stacked_rnn import StackedRNN

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


def from_checkpoint(stem: str, weights: Path | None, described: bool) -> tuple[nn.Module, Example]:
    """`NAME.safetensors` and `NAME.json` as StackedRNN saved them; its configuration says what it takes.

    Raises ExportError(checkpoint) where that is not so, and for `weights` or inputs that were `described`.
    """
    if weights or described:
        raise ExportError("checkpoint", "--weights and --input are for MODULE:FACTORY; a checkpoint says both itself")
    path = Path(stem)
    try:
        model = StackedRNN.load(path.with_name(path.name.removesuffix(".safetensors")))
    except CheckpointError as error:
        raise ExportError("checkpoint", str(error)) from error
    if model.config.vocabulary is not None:
        return model, {"x": torch.randint(0, model.config.vocabulary, (_BATCH, _TIME))}
    return model, {"x": InputSpec("x", torch.float32, (model.config.input_size or 1,)).example()}


def examples(inputs: Sequence[InputSpec], static: Sequence[InputSpec] = (), state: Sequence[StateSpec] = ()) -> Example:
    if not inputs:
        raise ExportError("input", "say what forward takes with --input NAME:DTYPE:SHAPE")
    found = {spec.name: spec.example() for spec in inputs} | {spec.name: spec.example()[:, 0] for spec in static}
    return found | {spec.input.name: spec.example() for spec in state}


def from_factory(target: str, weights: Path | None) -> nn.Module:
    """Import `MODULE:FACTORY`, also from the current directory, call it, and load `weights` into what it returns."""
    path, _, name = target.partition(":")
    sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(path), name)
        module = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:  # user code
        raise ExportError("checkpoint", f"{target} cannot be made: {first_line(error)}") from error
    finally:
        sys.path.remove("")
    if not isinstance(module, nn.Module):
        raise ExportError("checkpoint", f"{target} gives a {type(module).__name__}, not a torch.nn.Module")
    if weights:
        _load_weights(module, weights)
    return module


def _load_weights(module: nn.Module, path: Path) -> None:
    """Strict: nothing may be missing, left over or of another shape. Never runs code from the file."""
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(state.get("state_dict", state))
    except Exception as error:  # each format has its own
        raise ExportError("checkpoint", f"{path}: {' '.join(str(error).split())[:300]}") from error
