"""A checkpoint on disk: `NAME.safetensors` with the weights, `NAME.json` with the configuration.

No pickle: reading a checkpoint never runs code. Read strictly: nothing may be missing, unknown or of
another shape.
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


class CheckpointError(Exception):
    """A checkpoint that cannot be loaded, with the reason."""


def write(stem: Path, module: nn.Module, config: Any) -> None:
    """Write the module's state dict and `config`, a flat dataclass."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    _weights(stem).write_bytes(save(tensors))
    _configuration(stem).write_text(json.dumps(asdict(config), indent=2) + "\n")


def read_config(stem: Path, kind: type[Config]) -> Config:
    """The configuration, of dataclass `kind`. Every field must be there: a default may change, a file may not."""
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
    """Fill every parameter and buffer of `module`."""
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
