"""Runs a user's forward in float64, even where its code asks for float32: the reference for every comparison."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from unroll.export.held_objects import attributes, held_objects
from unroll.export.lifting.kept_values import NOT_OWN

Module = TypeVar("Module", bound=nn.Module)


def converted(model: Module, dtype: torch.dtype) -> Module:
    """A copy that computes in `dtype`. Tensors in plain attributes and their containers are converted, too."""
    copied = copy.deepcopy(model)
    copied._apply(partial(_in, dtype))
    for _, held in [*held_objects(copied)]:
        for name, value in attributes(held).items():
            if name not in NOT_OWN and any(_is_other(leaf, dtype) for leaf in pytree.tree_leaves(value)):
                object.__setattr__(held, name, pytree.tree_map(partial(_in, dtype), value))
    return copied


def exact(value: Any) -> Any:
    """The tensors in `value` in float64."""
    return pytree.tree_map(partial(_in, torch.float64), value)


def _is_other(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and _in(dtype, value) is not value


def _in(dtype: torch.dtype, value: Any) -> Any:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    wanted = dtype.to_complex() if value.is_complex() else dtype
    return value if value.dtype == wanted else value.detach().to(wanted)


#: PyTorch's messages about arguments of several types.
_MIXED = re.compile(r"(?i)same dtype|scalar type")


class _Float32IsDouble(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        swapped = {k: _swap(v) for k, v in (kwargs or {}).items()}
        try:
            return func(*map(_swap, args), **swapped)
        except RuntimeError as error:  # a tensor outside the module, such as a global one, is still float32
            if not _MIXED.search(str(error)) or "out" in swapped or func.__name__.endswith("_"):
                raise
            return func(*exact(args), **exact(swapped))


def _swap(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    return torch.complex128 if value is torch.complex64 else value


@contextmanager
def double_precision() -> Iterator[None]:
    """Make new tensors float64, and turn requests for float32 and complex64 into float64 and complex128."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float32IsDouble():
            yield
    finally:
        torch.set_default_dtype(before)
