"""Rules for torch.vmap over sequences, for calls where PyTorch's own rules would fix the number of sequences."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from unroll.export.lifting.recurrent_ops import gru, lstm, rnn


def _vmap(operator: Any, rows: tuple[int | None, ...]) -> None:
    """Register a rule that runs mapped sequences, each a batch of one, as one batch.

    `rows` holds the batch axis of each argument.
    """

    def run(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        def together(value: Any, dim: int | None, axis: int | None) -> Any:
            if axis is None:
                return value
            each = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            return each.movedim(0, axis).flatten(axis, axis + 1)

        results = operator(*map(together, arguments, in_dims, rows))
        return tuple(result.unflatten(1, (info.batch_size, -1)) for result in results), (1,) * len(results)

    torch.library.register_vmap(operator, run)


@torch.library.custom_op("unroll::cat", mutates_args=())
def cat(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """torch.cat with a vmap rule: PyTorch's own fixes the number of sequences."""
    return torch.cat(list(tensors), axis)


@cat.register_fake
def _(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return torch.cat(list(tensors), axis)


def _cat_rows(info: Any, in_dims: Any, tensors: Sequence[Tensor], axis: int) -> tuple[Tensor, int]:
    rows = [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims[0], strict=True)
    ]
    return torch.cat(rows, axis if axis < 0 else axis + 1), 0


torch.library.register_vmap(cat, _cat_rows)


#: PyTorch's functions that process the rows of a batch independently, and the dimensions of one row; 0 for any number.
_BY_ROWS = {
    functional.layer_norm: 0,
    functional.batch_norm: 0,
    functional.group_norm: 0,
    functional.instance_norm: 0,
    functional.linear: 0,
    torch.conv1d: 2,
    torch.conv2d: 3,
}

#: The calls of `by_rows`: a function and its arguments, with `Tensor` in place of each tensor. A few per traced model.
_CALLS: dict[str, tuple[Any, list[Any], Any]] = {}


@torch.library.custom_op("unroll::by_rows", mutates_args=())
def by_rows(tensors: Sequence[Tensor], call: str) -> Tensor:
    """Call one of `_BY_ROWS` with a vmap rule: PyTorch's own fixes the number of sequences.

    When the trace is lowered, the function itself runs.
    """
    return _called(tensors, call)


@by_rows.register_fake
def _(tensors: Sequence[Tensor], call: str) -> Tensor:
    return _called(tensors, call)


def _called(tensors: Sequence[Tensor], call: str) -> Tensor:
    function, leaves, structure = _CALLS[call]
    left = iter(tensors)
    args, kwargs = pytree.tree_unflatten([next(left) if leaf is Tensor else leaf for leaf in leaves], structure)
    return function(*args, **kwargs)


def _by_rows_rule(info: Any, in_dims: Any, tensors: Sequence[Tensor], call: str) -> tuple[Tensor, int]:
    (x, *weights), (dim, *others) = tensors, in_dims[0]
    if dim is None or any(other is not None for other in others):
        raise NotImplementedError(f"{_CALLS[call][0].__name__} with weights of a sequence's own")
    rows = x.movedim(dim, 0)
    if rows.dim() - 1 == _BY_ROWS[_CALLS[call][0]]:
        return _called([rows, *weights], call), 0
    return _called([rows.flatten(0, 1), *weights], call).unflatten(0, (info.batch_size, -1)), 0


torch.library.register_vmap(by_rows, _by_rows_rule)


#: Casts, at which PyTorch checks the tensor's size. It cannot do that within vmap.
_CASTS = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.long: torch.int64,
    Tensor.int: torch.int32,
    Tensor.bool: torch.bool,
}


def _cast_to(func: Any, args: Any, kwargs: Any) -> torch.dtype | None:
    """The target dtype, if the call only casts its first argument."""
    if func in _CASTS:
        return _CASTS[func]
    if func in {Tensor.to, Tensor.type, Tensor.type_as}:
        given = [*args[1:], *kwargs.values()]
        if len(given) == 1 and isinstance(given[0], (torch.dtype, Tensor)):
            return given[0].dtype if isinstance(given[0], Tensor) else given[0]
    return None


class OneByOne(TorchFunctionMode):
    """Replaces calls by equivalents that have a rule in this module."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in {torch.cat, torch.concat, torch.stack} and args:
            tensors, axis = args[0], kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
            if func is torch.stack:
                tensors = [tensor.unsqueeze(axis) for tensor in tensors]
            return torch.ops.unroll.cat(list(tensors), axis)
        if dtype := _cast_to(func, args, kwargs):
            return args[0] if args[0].dtype == dtype else torch.ops.aten._to_copy.default(args[0], dtype=dtype)
        if func is functional.linear and args and args[0].dim() == 1:  # PyTorch cannot trace it for a view
            return func(args[0].clone(memory_format=torch.contiguous_format), *args[1:], **kwargs)
        if func in _BY_ROWS and args and (func is not functional.linear or args[0].dim() > 2):
            leaves, structure = pytree.tree_flatten((args, kwargs))
            given = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            call = f"{func.__name__} {given} {structure}"
            _CALLS[call] = func, given, structure
            return torch.ops.unroll.by_rows([leaf for leaf in leaves if isinstance(leaf, Tensor)], call)
        return func(*args, **kwargs)


_vmap(lstm, (1, 0, 1, 1, None, None, None))
_vmap(gru, (1, 0, 1, None, None, None))
_vmap(rnn, (1, 0, 1, None, None, None, None))
