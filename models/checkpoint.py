"""A checkpoint on disk: `NAME.safetensors` holds the weights, `NAME.json` the configuration.

The contract:

- Reading a checkpoint never runs code: there is no pickle.
- Reading is strict. A field or a tensor that is missing, unknown or of another shape is a CheckpointError, which names
  the file. A field that equals its default is written and required, too: a default may change, a file may not.
- `stem` is the path without a suffix; a dot in its name is part of the name.
- What `write` wrote, `read_config` and `read_weights` give back: equal configuration, weights equal bit for bit.
- The two files are written one after the other: a reader during a write may see one new and one old file.
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
    """A checkpoint that cannot be read. The message names the file and the reason."""


def write(stem: Path, module: nn.Module, config: Any) -> None:
    """Write a checkpoint, over an existing one; the folder is created.

    Args:
        stem: path without a suffix.
        module: its state dict is written, parameters and persistent buffers.
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
    """The configuration of a checkpoint.

    Args:
        stem: path without a suffix.
        kind: the dataclass that was written.

    Raises:
        CheckpointError: if the file is missing, damaged, or has other fields or types than `kind`.
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
        CheckpointError: if the file is missing or damaged, or its tensors are not those of `module`.
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
