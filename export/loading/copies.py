"""Copies of the user's model and example: export changes neither."""

import copy
import operator
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from unroll.export.errors import ExportError
from unroll.export.signature.outputs import is_same


def detached_copy(module: nn.Module) -> nn.Module:
    """The module on the CPU, in eval mode, without gradients; unwrapped if it was compiled.

    Raises:
        ExportError: not_copyable.
    """
    module = getattr(module, "_orig_mod", module)
    try:
        with torch.no_grad():
            # A layer's normalised weight is a result of its parameters: it cannot be copied, and forward computes it.
            computed = [w for m in module.modules() if isinstance(m, nn.RNNBase) for w in m._flat_weights]
            memo: dict[int, Any] = {id(w): w.detach() for w in computed if w is not None and not w.is_leaf}
            copied = copy.deepcopy(module, memo)
            copied.cpu()
            copied.eval()
            copied.requires_grad_(False)
            return copied
    except Exception as error:  # user code
        raise ExportError(
            "not_copyable",
            f"copy.deepcopy fails on {_not_copyable(module)}; detach or delete tensors kept from training: {error}",
        ) from error


def _not_copyable(module: nn.Module) -> str:
    """What of the module copy.deepcopy fails on."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name != "_modules":
                try:
                    copy.deepcopy(value)
                except (RuntimeError, TypeError):
                    return f"{'.'.join(filter(None, (path, name)))!r}, a {type(value).__name__}"
    return "the module"


def detached_example(example: dict[str, Any]) -> dict[str, Any]:
    """The inputs that are given, on the CPU and without gradients. Forward may change them in place."""
    given = {name: value for name, value in example.items() if value is not None}
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), given)


def move_time(model: nn.Module, example: dict[str, Any], others: Collection[str]) -> dict[str, Any]:
    """The example with its time second. From now on, forward gets what it is given with the time last.

    Args:
        others: the arguments without time.
    """

    def moved(values: dict[str, Any], time: int, to: int) -> dict[str, Any]:
        return {
            name: value.movedim(time, to) if isinstance(value, Tensor) and name not in others else value
            for name, value in values.items()
        }

    model.register_forward_pre_hook(lambda _, args, kwargs: (args, moved(kwargs, 1, -1)), with_kwargs=True)
    return moved(example, -1, 1)


def keep_arguments(model: nn.Module, example: dict[str, Any]) -> None:
    """Call a forward that changes its arguments in place with copies from now on."""
    given, before = _fresh(example), pytree.tree_leaves(example)
    left = pytree.tree_leaves(given)
    with torch.no_grad(), suppress(Exception):  # a later check has a clearer message
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
    """The example with tensors of `dtype` in float32."""
    return pytree.tree_map_only(Tensor, lambda t: t.float() if t.dtype == dtype else t, example)
