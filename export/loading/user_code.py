"""Loads what the command line names: a module from a checkpoint or from the user's own code, and its weights."""

import importlib
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from unroll.export.errors import ExportError, first_line
from unroll.export.loading.example_inputs import Example, InputSpec, token_example
from unroll.models.checkpoint import CheckpointError
from unroll.models.stacked_rnn import StackedRNN


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
        return model, {"x": token_example(model.config.vocabulary)}
    return model, {"x": InputSpec("x", torch.float32, (model.config.input_size or 1,)).example()}


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
