"""Runs a user's forward in float64, also where its code asks for float32: the reference for every comparison."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Module = TypeVar("Module", bound=nn.Module)


def converted(model: Module, dtype: torch.dtype) -> Module:
    """A copy that computes in `dtype`, including tensors that are plain attributes."""
    copied = copy.deepcopy(model)
    copied.to(dtype)  # a module of the user's own may not return itself
    for module in copied.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(module, name, value.detach().to(dtype))
    return copied


class _Float32IsDouble(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        swapped = {k: _swap(v) for k, v in (kwargs or {}).items()}
        return func(*map(_swap, args), **swapped)


def _swap(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def double_precision() -> Iterator[None]:
    """Within, new tensors are float64, and a request for float32 means float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float32IsDouble():
            yield
    finally:
        torch.set_default_dtype(before)
