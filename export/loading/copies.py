"""Copies the user's model and example, so that export modifies neither."""

import copy
import operator
from collections.abc import Collection
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from unroll.export.errors import ExportError
from unroll.export.signature.outputs import is_same

#: PyTorch's own attributes of a module.
_NOT_OWN = {*vars(nn.Module())}

#: Methods with which a class copies its modules itself.
_COPYING = {"__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__"}


def detached_copy(module: nn.Module) -> nn.Module:
    """Copy the module to the CPU, in eval mode and without gradients; a compiled module is unwrapped.

    Raises:
        ExportError: not_copyable.
    """
    module = getattr(module, "_orig_mod", module)
    try:
        with torch.no_grad(), _Detach():
            # A normalised weight is computed from parameters: it cannot be copied, and forward recomputes it.
            computed = [w for m in module.modules() if isinstance(m, nn.RNNBase) for w in m._flat_weights]
            memo: dict[int, Any] = {id(w): w.detach() for w in computed if w is not None and not w.is_leaf}
            try:
                copied = _copied(module, dict(memo))
            except (RuntimeError, TypeError):
                copied = _copied(module, memo | _left_out(module))
            copied.cpu()
            copied.eval()
            copied.requires_grad_(False)
    except Exception as error:  # user code
        raise ExportError(
            "not_copyable",
            f"copy.deepcopy fails on the module: {error}; export a module that holds only the layers",
        ) from error
    for path, part in copied.named_modules():
        forward = vars(part).get("forward")
        held = [cell.cell_contents for cell in getattr(forward, "__closure__", None) or ()]
        if any(isinstance(getattr(one, "__self__", one), nn.Module) for one in held):
            raise ExportError(
                "not_copyable",
                f"forward of {path or type(part).__name__!r} was replaced by a function that holds the layer, so "
                "copies run the original; replace it by a plain layer with the same weights",
            )
    return copied


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Deep-copy, bypassing `__deepcopy__` methods of user classes, which may omit what export adds."""
    for part in reversed([*module.modules()]):
        owner = next((kind for kind in type(part).__mro__ if _COPYING & vars(kind).keys()), None)
        if owner and not owner.__module__.startswith(("torch.", "unroll.", "builtins")):
            memo[id(part)] = _whole(part, memo)
    return copy.deepcopy(module, memo)


def _whole(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a module of the same class with all its attributes and slots. Copies of the copy are made like this, too."""
    copied: nn.Module = object.__new__(type(module))
    memo[id(module)] = copied
    state: Any = object.__getstate__(module)
    attributes, slots = state if isinstance(state, tuple) else (state, {})
    vars(copied).update(copy.deepcopy({n: v for n, v in attributes.items() if n != "__deepcopy__"}, memo))
    vars(copied)["__deepcopy__"] = partial(_whole, copied)
    for name, value in slots.items():
        object.__setattr__(copied, name, copy.deepcopy(value, memo))
    return copied


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
    """A memo for copy.deepcopy that replaces the attributes it fails on."""
    found = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in _NOT_OWN:
                try:
                    copy.deepcopy(value)
                except (RuntimeError, TypeError):
                    found[id(value)] = NotCopied(".".join(filter(None, (path, name))), value)
    return found


def detached_example(example: dict[str, Any]) -> dict[str, Any]:
    """Copy the inputs to the CPU, without gradients and without None values. Forward may modify the copy in place."""
    given = {name: value for name, value in example.items() if value is not None}
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
