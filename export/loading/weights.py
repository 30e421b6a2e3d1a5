"""Loads weights from a file into a module, and handles the keys and prefixes that trainers add."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unroll.export.errors import ExportError, first_line
from unroll.export.loading.weight_files import read_weights

#: The keys under which checkpoints keep the weights, in order of preference.
_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params")

#: Name components added by wrappers: DataParallel, torch.compile.
_WRAPPERS = ("module", "_orig_mod")

#: The most names in one message.
_FEW = 5


def load_weights(module: nn.Module, path: Path) -> str | None:
    """Load weights strictly: nothing may be missing, left over or of another shape.

    Returns:
        How names had to be changed, or None if they match the module's.

    Raises:
        ExportError: checkpoint, with a description of the file and a remedy.
    """
    module = getattr(module, "_orig_mod", module)
    own = {name: tuple(getattr(value, "shape", ())) for name, value in module.state_dict().items()}
    key, tensors = _found(read_weights(path), path)
    fitted, how = _fitted(tensors, own)
    notes = [f"under the key {key!r}"] * bool(key) + how
    if problems := _problems(fitted, own):
        where = f" ({', '.join(notes)})" if notes else ""
        raise ExportError("checkpoint", f"{path}{where} does not fit {type(module).__name__}: {'; '.join(problems)}")
    try:
        module.load_state_dict(fitted)
    except Exception as error:  # a module may read its own state as it likes
        raise ExportError("checkpoint", f"{path} cannot be loaded: {first_line(error)}") from error
    return ", ".join(notes) or None


def _found(content: Mapping[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """Find the weights in a checkpoint; returns their key, or an empty one if the file holds only weights."""
    places = {"": content} | {key: value for key, value in content.items() if isinstance(value, Mapping)}
    weights = [key for key, value in places.items() if _is_weights(value)]
    usual = [key for key in ("", *_KEYS) if key in weights]
    if not usual and len(weights) != 1:
        there = ", ".join(map(repr, list(content)[:_FEW])) or "nothing"
        raise ExportError(
            "checkpoint",
            f"{path} does not hold one distinguishable set of named weights ({there}); load it in Python and save only "
            'the weights: torch.save(model.state_dict(), "weights.pt")',
        )
    key = (usual or weights)[0]
    return key, dict(places[key])


def _is_weights(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(item, Tensor) for item in value.values()) and all(isinstance(key, str) for key in value)


def _fitted(tensors: dict[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Rename the tensors to the module's names, if a renaming fits; returns them with notes on the changes."""
    if tensors.keys() == own.keys():
        return tensors, []
    for wrappers in ((), *((one,) for one in _WRAPPERS), _WRAPPERS):
        named = {_without(name, wrappers): tensor for name, tensor in tensors.items()}
        removed = [f"without {one!r} in its names" for one in wrappers]
        for prefix in _prefixes(named, own):
            inner = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
            if own.keys() <= inner.keys() and len(named) == len(tensors):
                rest = sorted(name for name in named if not name.startswith(prefix))
                note = f"without the prefix {prefix!r}" + (f", ignoring {_some(rest)}" if rest else "")
                return inner, removed + [note] * bool(prefix)
    return tensors, []


def _without(name: str, wrappers: tuple[str, ...]) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _prefixes(tensors: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Possible prefixes of the module's names."""
    first = next(iter(own), "")
    return [name.removesuffix(first) for name in tensors if name == first or name.endswith(f".{first}")]


def _problems(tensors: Mapping[str, Any], own: Mapping[str, tuple[int, ...]]) -> list[str]:
    missing, extra = (sorted(set(a) - set(b)) for a, b in ((own, tensors), (tensors, own)))
    shapes = [
        f"{name} is {tuple(tensors[name].shape)} in the file and {shape} in the model"
        for name, shape in own.items()
        if isinstance(tensors.get(name), Tensor) and tuple(tensors[name].shape) != shape
    ]
    return [
        *([f"the file lacks {_some(missing)}"] if missing else []),
        *([f"the model lacks {_some(extra)}"] if extra else []),
        *shapes[:_FEW],
        *([f"and {len(shapes) - _FEW} more have another shape"] if len(shapes) > _FEW else []),
    ]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more
