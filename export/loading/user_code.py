"""Loads a module from the user's own code: `models:Net`, `models.net:Net` or `path/to/net.py:Net`.

Imports are found as Python finds them: from the current directory for a dotted name, as for `python -m`; from the
file's own folder for a file, as for `python path/to/net.py`, and relative to its package if it is in one.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from torch import nn

from unroll.export.errors import ExportError, first_line


@contextmanager
def importable(target: str) -> Iterator[None]:
    """Within, the code of `target` finds its imports, also those that run later, in a factory or in forward.

    Args:
        target: `MODULE:FACTORY` or `FILE.py:FACTORY`; anything else changes nothing.
    """
    folders = [str(folder) for folder in _folders(target)]
    sys.path[:0] = folders
    try:
        yield
    finally:
        for folder in folders:
            if folder in sys.path:
                sys.path.remove(folder)


def from_factory(target: str, weights: Path | None = None) -> nn.Module:
    """Import the code that `target` names, call its factory, and load `weights`. Call it within `importable`.

    Args:
        target: `MODULE:FACTORY` or `FILE.py:FACTORY`. FACTORY is a class, a function without arguments, or a module.
        weights: a file of safetensors, or one that torch.save wrote.

    Raises:
        ExportError: checkpoint, if the code cannot be imported, gives no torch.nn.Module, or does not fit the weights.
    """
    source, _, name = target.rpartition(":")
    try:
        factory = getattr(_imported(source), name)
        module = factory if isinstance(factory, nn.Module) else factory()
    except ExportError:
        raise
    except Exception as error:  # user code
        raise ExportError("checkpoint", f"{target} cannot be loaded: {first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ExportError("checkpoint", f"{target} gives a {type(module).__name__}, not a torch.nn.Module")
    if weights:
        _load_weights(module, weights)
    return module


def _folders(target: str) -> list[Path]:
    source, colon, _ = target.rpartition(":")
    if not colon:
        return []
    if not source.endswith(".py"):
        return [Path.cwd()]
    path = Path(source).resolve()
    _, root = _place(path)
    return list(dict.fromkeys([root, path.parent]))


def _place(path: Path) -> tuple[str, Path]:
    """The dotted name of a file within its packages, and the folder that the outermost package is in."""
    name, folder = path.stem, path.parent
    while (folder / "__init__.py").is_file():
        name, folder = f"{folder.name}.{name}", folder.parent
    return name, folder


def _imported(source: str) -> ModuleType:
    if source.endswith(".py"):
        return _from_file(Path(source).resolve())
    module = importlib.import_module(source)
    own = Path(*source.split(".")).with_suffix(".py").resolve()
    # Another module may have the name already, as the standard library's `types` has.
    return module if not own.is_file() or _is_from(module, own) else _from_file(own)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ExportError("checkpoint", f"there is no file {path}")
    name, _ = _place(path)
    if "." in name:
        module = importlib.import_module(name)
        if not _is_from(module, path):
            raise ExportError("checkpoint", f"{path} is {name}, and so is {module.__file__}; rename the package")
        return module
    known = sys.modules.get(name)
    if known is not None and _is_from(known, path):
        return known
    return _executed(name if known is None else f"unroll_user_code_{name}", path)


def _executed(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_from(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path


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
