"""Copies the user's model and example, so that export modifies neither."""

import copy
import operator
import weakref
from collections.abc import Collection
from contextlib import AbstractContextManager, suppress
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from unroll.export.errors import ExportError
from unroll.export.held_objects import attributes, held_objects, is_foreign, is_leaf
from unroll.export.signature.outputs import is_plain, is_same

#: Methods with which a class copies its objects itself.
_COPYING = {"__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__"}


def detached_copy(module: nn.Module) -> nn.Module:
    """Copy the module to the CPU, in eval mode and without gradients; a compiled module is unwrapped.

    Raises:
        ExportError: not_copyable.
    """
    module = getattr(module, "_orig_mod", module)
    _check_references(module)
    try:
        with torch.no_grad(), _Detach():
            # A normalised weight is computed from parameters: it cannot be copied, and forward recomputes it.
            computed = [w for m in module.modules() if isinstance(m, nn.RNNBase) for w in m._flat_weights]
            memo: dict[int, Any] = {id(w): w.detach() for w in computed if w is not None and not w.is_leaf}
            try:
                copied = _copied(module, dict(memo))
            except (RuntimeError, TypeError):
                copied = _copied(module, memo | _left_out(module))
            _register(copied)
            copied.cpu()
            copied.eval()
            copied.requires_grad_(False)
    except Exception as error:  # user code
        raise ExportError(
            "not_copyable",
            f"copy.deepcopy fails on the module: {error}; export a module that holds only the layers",
        ) from error
    return copied


def _check_references(module: nn.Module) -> None:
    for path, value in held_objects(module):
        if any(isinstance(one, nn.Module) and one.state_dict() for one in _referred_to(value)):
            kind = "function" if isinstance(value, FunctionType) else "weak reference"
            raise ExportError(
                "not_copyable",
                f"{path!r} is a {kind} that refers to a module, so copies of the model run the original one; make it a "
                "method, assign the module itself to an attribute, or export the plain layer with its weights",
            )


def _referred_to(value: Any) -> list[Any]:
    """What the copy of a function or weak reference shares with the original."""
    if isinstance(value, weakref.ref):
        return [value()]
    if type(value) in weakref.ProxyTypes:
        return [value]
    cells = value.__closure__ or () if isinstance(value, FunctionType) else ()
    held = [cell.cell_contents for cell in cells if cell != type(cell)()]
    return [getattr(one, "__self__", one) for one in held]


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Deep-copy, bypassing the copying methods of user classes, which may change values or omit what export adds."""
    own = [value for _, value in held_objects(module) if attributes(value) and copies_itself(value)]
    for value in own:
        with suppress(TypeError):  # a class that derives from one of C has more than attributes
            memo[id(value)] = object.__new__(_kind(value))
    for value in own:
        if id(value) in memo:
            _fill(memo[id(value)], value, memo)
    return copy.deepcopy(module, memo)


def copies_itself(value: Any) -> bool:
    """Has the class of `value` copying methods of the user's?"""
    owner = next((kind for kind in type(value).__mro__ if _COPYING & vars(kind).keys()), object)
    return not is_foreign(owner) and not owner.__module__.startswith("unroll.")


def _kind(value: Any) -> type:
    """The class of a copy: a subclass, if there is no `__dict__` to put another copying method into."""
    kind = type(value)
    own = {"__slots__": (), "__deepcopy__": _whole}
    return kind if hasattr(value, "__dict__") else type(kind.__name__, (kind,), own)


def _whole(value: Any, memo: dict[int, Any]) -> Any:
    memo[id(value)] = copied = object.__new__(type(value))
    return _fill(copied, value, memo)


def _fill(copied: Any, value: Any, memo: dict[int, Any]) -> Any:
    """Copy all attributes and slots to `copied`, and make its own copies like this, too."""
    named = getattr(copied, "__dict__", {})
    for name, part in attributes(value).items():
        if name in getattr(value, "__dict__", ()):
            named[name] = copy.deepcopy(part, memo)
        else:
            object.__setattr__(copied, name, copy.deepcopy(part, memo))
    named["__deepcopy__"] = MethodType(_whole, copied)
    return copied


def _register(module: nn.Module) -> None:
    """Make modules in plain lists, helpers and attributes parts of `module`, so that changes reach all of them."""
    for path, value in [*held_objects(module)]:
        if issubclass(type(value), nn.Module) and value not in {*module.modules()} and module not in {*value.modules()}:
            name = path.replace(".", "/")
            module.add_module(f"{name}/" if hasattr(module, name) else name, value)


class _Detach(TorchFunctionMode):
    """Copies non-leaf tensors, which training left behind, without their autograd history."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone()
        return memo[id(tensor)]


class NotCopied:
    """Replaces an attribute that cannot be copied, such as a lock or a logger. Using it raises ExportError."""

    def __init__(self, name: str, value: Any) -> None:
        self._name, self._kind = name, type(value).__name__

    def __deepcopy__(self, memo: Any) -> "NotCopied":
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "fget":  # for code that inspects every attribute
            raise AttributeError(name)
        return self._refuse()

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise ExportError(
            "not_copyable",
            f"forward uses {self._name!r}, a {self._kind}, which copy.deepcopy cannot copy; do not use it in forward, "
            "or set it to None before the export",
        )

    __call__ = __enter__ = __exit__ = __getitem__ = __setitem__ = __iter__ = __len__ = __bool__ = _refuse


def _left_out(module: nn.Module) -> dict[int, NotCopied]:
    """A memo for copy.deepcopy that replaces the objects it fails on."""
    found = {}
    for path, value in held_objects(module):
        if is_leaf(value):
            try:
                copy.deepcopy(value)
            except (RuntimeError, TypeError):
                found[id(value)] = NotCopied(path, value)
    return found


def detached_example(example: dict[str, Any]) -> dict[str, Any]:
    """Copy the inputs to the CPU, without gradients and without None values. Forward may modify the copy in place."""
    given = {name: value for name, value in example.items() if value is not None}
    for name, value in given.items():
        if not all(is_plain(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)):
            raise ExportError("input", f"input {name!r} is a sparse or nested tensor; give a padded one")
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), given)


def move_time(model: nn.Module, example: dict[str, Any], others: Collection[str]) -> dict[str, Any]:
    """Move time to the second axis of the example, and make forward move it back to the last.

    Args:
        model: the user's model.
        example: its arguments.
        others: the arguments without time.
    """

    def moved(values: dict[str, Any], time: int, to: int) -> dict[str, Any]:
        return {
            name: value.movedim(time, to) if isinstance(value, Tensor) and name not in others else value
            for name, value in values.items()
        }

    model.register_forward_pre_hook(lambda _, args, kwargs: (args, moved(kwargs, 1, -1)), with_kwargs=True)
    return moved(example, -1, 1)


def keep_arguments(model: nn.Module, example: dict[str, Any], watch: AbstractContextManager[Any]) -> None:
    """If forward modifies its arguments in place, make it work on copies from now on.

    Args:
        model: a copy of the user's model.
        example: the arguments of forward.
        watch: a context manager entered for the trial call.
    """
    given, before = _fresh(example), pytree.tree_leaves(example)
    left = pytree.tree_leaves(given)
    with torch.no_grad(), suppress(Exception), watch:  # a later check has a clearer message
        copy.deepcopy(model)(**given)
    now = pytree.tree_leaves(given)
    if len(now) == len(left) and all(map(operator.is_, now, left)) and all(map(_is_same, now, before)):
        return
    model.register_forward_pre_hook(lambda _, args, kwargs: (_fresh(args), _fresh(kwargs)), with_kwargs=True)


def _is_same(one: Any, other: Any) -> bool:
    return not isinstance(one, Tensor) or is_same(one, other)


def _fresh(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.clone(), values)


def as_float32(example: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Convert the example's tensors of `dtype` to float32."""
    return pytree.tree_map_only(Tensor, lambda t: t.float() if t.dtype == dtype else t, example)
