"""The objects that a module holds: in its attributes and containers, and in those of its helpers."""

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: Packages whose objects are values, apart from modules and containers.
FOREIGN = {*sys.stdlib_module_names, "torch", "numpy"}

_CONTAINERS = (dict, list, tuple, set, deque, partial, MethodType, SimpleNamespace)

_PLAIN = {type, type(None), str, int, float, bool}

#: PyTorch's tables of a module's parts.
_TABLES = ("_parameters", "_buffers", "_modules")


def is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in FOREIGN


def held_objects(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield all objects that copies of `root` copy, each once and with its path, such as `filters[0].gain`."""
    seen: dict[int, Any] = {}
    waiting = [("", root)]
    while waiting:
        path, value = waiting.pop()
        if id(value) not in seen and type(value) not in _PLAIN:
            seen[id(value)] = value
            yield path.removeprefix("."), value
            waiting += [(path + name, part) for name, part in _parts(value)]


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in [*value.items()])
    elif isinstance(value, (list, tuple, set, deque)):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, MethodType):
        yield "", value.__self__
    elif isinstance(value, partial):
        yield "", (value.func, value.args, value.keywords)
    for name, part in attributes(value).items():
        if name in _TABLES and isinstance(value, nn.Module):
            yield from ((f".{key}", each) for key, each in part.items())
        else:
            yield f".{name}", part


def attributes(value: Any) -> dict[str, Any]:
    """The attributes and slots of a module, or of an object of a class in Python that is the user's."""
    kind = type(value)  # a weak proxy has another __class__
    if not issubclass(kind, (nn.Module, SimpleNamespace)) and (is_foreign(kind) or issubclass(kind, (type, Tensor))):
        return {}
    state: Any = object.__getstate__(value)
    named, slots = state if isinstance(state, tuple) else (state, None)
    return {n: part for n, part in {**(named or {}), **(slots or {})}.items() if n != "__deepcopy__"}


def is_leaf(value: Any) -> bool:
    return not isinstance(value, (*_CONTAINERS, Tensor)) and not attributes(value)


@contextmanager
def undone(module: nn.Module) -> Iterator[None]:
    """Undo what calls of `module` change in it and in the objects that it holds."""
    kept: list[tuple[Any, Any]] = []
    for _, value in held_objects(module):
        if isinstance(value, Tensor):
            kept.append((value, value.detach().clone()))
        elif isinstance(value, (np.ndarray, dict, list, set, deque)):
            kept.append((value, value.copy()))
        if hasattr(value, "__dict__") and attributes(value):
            kept.append((vars(value), vars(value).copy()))
            kept += [(part, part.copy()) for part in map(vars(value).get, _TABLES) if isinstance(part, dict)]
    try:
        yield
    finally:
        for value, before in kept:
            _restore(value, before)


def _restore(value: Any, before: Any) -> None:
    if isinstance(value, Tensor):
        if not torch.equal(value, before):
            value.data.copy_(before)
    elif isinstance(value, np.ndarray):
        value[...] = before
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(before)
    else:
        value.clear()
        value.extend(before)
