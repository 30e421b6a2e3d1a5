"""Checkpoints on disk: `NAME.safetensors` holds the weights, `NAME.json` the configuration.

The contract:

- Reading a checkpoint never runs code: there is no pickle.
- Reading is strict. A field or tensor that is missing, unknown or of another shape raises CheckpointError, which names
  the file. Fields with default values are written and required, too, because a default may change later.
- `stem` is the path without a suffix; a dot in its name is part of the name.
- `read_config` and `read_weights` restore what `write` wrote: an equal configuration, and weights equal bit for bit.
- The two files are not written atomically: a concurrent reader may see one new and one old file.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

Config = TypeVar("Config")
Module = TypeVar("Module", bound=nn.Module)


class CheckpointError(Exception):
    """A checkpoint cannot be read; the message gives the file and the reason."""


def write(stem: Path, module: nn.Module, config: Any) -> None:
    """Write a checkpoint, replacing an existing one and creating the folder.

    Args:
        stem: path without a suffix.
        module: the module, of which the state dict is written.
        config: a flat dataclass of JSON values.

    Raises:
        OSError: if a file cannot be written.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    _weights(stem).write_bytes(save(tensors))
    _configuration(stem).write_text(json.dumps(asdict(config), indent=2) + "\n")


def read(stem: Path, model: Module, config: Any) -> Module:
    """Return `model`, with the weights of a checkpoint and in evaluation mode.

    Raises:
        CheckpointError: if the checkpoint cannot be read or has another configuration.
    """
    if read_config(stem, type(config)) != config:
        raise CheckpointError(f"{stem}: trained with another configuration than {config}")
    read_weights(stem, model)
    return model.eval()


def read_config(stem: Path, kind: type[Config]) -> Config:
    """Read the configuration of a checkpoint.

    Args:
        stem: path without a suffix.
        kind: the dataclass to read.

    Raises:
        CheckpointError: if the file is missing or damaged, or its fields or types differ from `kind`.
    """
    path = _configuration(stem)
    try:
        text = path.read_text()
        config = TypeAdapter(kind).validate_json(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    missing = {field.name for field in fields(kind)} - json.loads(text).keys()  # type: ignore[arg-type]
    if missing:
        raise CheckpointError(f"{path}: missing {', '.join(sorted(missing))}")
    return config


def read_weights(stem: Path, module: nn.Module) -> None:
    """Copy the weights of a checkpoint into `module`.

    Raises:
        CheckpointError: if the file is missing or damaged, or its tensors do not match `module`.
    """
    path = _weights(stem)
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _weights(stem: Path) -> Path:
    return stem.with_name(stem.name + ".safetensors")


def _configuration(stem: Path) -> Path:
    return stem.with_name(stem.name + ".json")
