"""Non-tensor values that forward keeps between calls: counters, flags, lists, random generators.

A state row cannot hold them, and a bundle without them would be wrong as soon as they matter.
"""

import dis
import pickle
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import CodeType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from unroll.export.errors import ExportError
from unroll.export.held_objects import FOREIGN, attributes
from unroll.export.signature.outputs import is_plain, leaves

#: Names a value in messages: `attribute 'cell.calls'`.
Name = str

#: PyTorch's own attributes of a module.
NOT_OWN = {*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"}


def kept_values(model: nn.Module) -> dict[Name, tuple[Any, ...]]:
    """Comparable contents of every attribute, class attribute and variable that the code of `model` reads.

    For an attribute that holds only tensors, just their number: `module_state` tracks their values.
    """
    return {name: tuple(_Walk(followed=_holds_tensors(value)).all_of(value)) for name, value in _owned(model)}


def check_nothing_counted(seen: list[dict[Name, tuple[Any, ...]]]) -> None:
    """Raise ExportError(keeps_state) for a value that depends on more than the last call.

    Args:
        seen: `kept_values` after four calls: with inputs A, B, A and A.
    """
    first, _, third, fourth = seen
    counted = [name for name in fourth if fourth[name] != third.get(name) or third[name] != first.get(name)]
    if counted:
        raise ExportError(
            "keeps_state",
            f"forward changes {', '.join(counted)} with every call. It is not a tensor with a row per client, so the "
            "state cannot hold it: remove it, or pass it to forward and return it as a tensor (`state`)",
        )


def _holds_tensors(value: Any) -> bool:
    try:
        leaves(value)
    except ExportError:
        return False
    return True


def _owned(model: nn.Module) -> Iterator[tuple[Name, Any]]:
    read: set[str] = set()
    functions: dict[CodeType, FunctionType] = {}
    classes = {cls: None for module in model.modules() for cls in type(module).__mro__ if not _is_foreign(cls)}
    for cls in classes:
        for value in vars(cls).values():
            _reach(value, functions, read)
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in NOT_OWN:
                _reach(value, functions, read)
                if name in read or "getattr" in read:
                    yield f"attribute {'.'.join(filter(None, (path, name)))!r}", value
    for cls in classes:
        for name, value in vars(cls).items():
            if name in read and not _is_code(value):
                yield f"class attribute '{cls.__name__}.{name}'", value
    for function in functions.values():
        for name, value in _variables(function):
            if not _is_code(value):
                yield f"variable {name!r} of {function.__module__!r}", value


def _reach(value: Any, functions: dict[CodeType, FunctionType], read: set[str]) -> None:
    """If `value` is a function, add all functions it can reach by name, and the names that their code reads."""
    value = getattr(value, "__wrapped__", getattr(value, "__func__", getattr(value, "fget", value)))
    if not isinstance(value, FunctionType) or value.__code__ in functions or _is_foreign(value):
        return
    functions[value.__code__] = value
    for code in _codes(value.__code__):
        read |= {
            str(each.argval)
            for each in dis.get_instructions(code)
            if each.opname in {"LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_SUPER_ATTR"}
        }
    for _, other in _variables(value):
        _reach(other, functions, read)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _variables(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """A function's global variables, those of the user's own modules it names, its closure and its defaults."""
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        if isinstance(value, ModuleType) and not _is_foreign(value):
            yield from ((f"{name}.{inner}", vars(value)[inner]) for inner in sorted(names & vars(value).keys()))
        else:
            yield name, value
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if cell != type(cell)():
            yield name, cell.cell_contents
    yield f"{function.__name__}()", [*(function.__defaults__ or ()), function.__kwdefaults__, vars(function)]


def _is_code(value: Any) -> bool:
    return isinstance(value, (ModuleType, type, nn.Module, property)) or callable(value)


def _is_foreign(value: Any) -> bool:
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or "builtins"
    return str(module).partition(".")[0] in FOREIGN


class _Walk:
    """Flattens the contents of an object to a list. With `followed`, tensors count but their contents do not."""

    def __init__(self, followed: bool) -> None:
        self._followed = followed
        self._leaves: list[Any] = []
        self._seen: dict[int, Any] = {}

    def all_of(self, value: Any) -> list[Any]:
        self._add(value)
        return self._leaves

    def _add(self, *values: Any) -> None:
        for value in values:
            value = value.__self__ if isinstance(value, MethodType) else value
            if value is None or isinstance(value, (bool, int, str, bytes)):
                self._leaves.append(value)
            elif id(value) not in self._seen and not isinstance(value, (ModuleType, type, nn.Module, FunctionType)):
                self._seen[id(value)] = value
                self._add_object(value)

    def _add_object(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._leaves.append(value.detach().cpu().tolist() if not self._followed and is_plain(value) else None)
        elif isinstance(value, Mapping):
            self._add(len(value), *value.keys(), *value.values())
        elif isinstance(value, (list, tuple, deque)):
            self._add(len(value), *value)
        elif isinstance(value, torch.Generator):
            self._leaves.append(value.get_state().tolist())
        elif isinstance(value, GeneratorType):
            self._add(value.gi_frame and value.gi_frame.f_lasti, dict(value.gi_frame.f_locals) if value.gi_frame else 0)
        elif parts := attributes(value):
            self._add(parts)
        else:
            with suppress(Exception):  # ignore objects that cannot be pickled
                self._leaves.append(pickle.dumps(value))
