"""Makes `squeeze()` without an axis independent of the size.

On a single sequence or time step it would also drop batch or time. Here it always drops the axes that it drops at
larger sizes.
"""

from typing import Any

import torch
from torch import Tensor

from unroll.export.lifting.dataflow import Observer

#: The axes that each call drops, in order.
Squeezes = list[tuple[int, ...]]

_FUNCTIONS = {torch.squeeze, Tensor.squeeze, torch.ops.aten.squeeze.default}


class WatchSqueezes(Observer):
    """Records the axes that each call drops."""

    def __init__(self) -> None:
        self.seen: Squeezes = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (tensor := _squeezed(func, args, kwargs)) is not None:
            self.seen.append(tuple(axis for axis, size in enumerate(tensor.shape) if size == 1))
        return func(*args, **kwargs)


class KeepSqueezes(Observer):
    """Makes each call drop the recorded axes."""

    def __init__(self, squeezes: Squeezes) -> None:
        self._left = iter(squeezes)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = _squeezed(func, args, kwargs)
        if tensor is not None and (axes := next(self._left, None)) is not None:
            return torch.squeeze(tensor, axes)
        return func(*args, **kwargs)


def _squeezed(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The tensor, if the call is a squeeze of all axes of size 1."""
    if func not in _FUNCTIONS or len(args) + len(kwargs) != 1:
        return None
    return args[0] if args else kwargs["input"]


def common(seen: list[Squeezes]) -> Squeezes:
    """The axes that the calls drop at every recorded size; empty if the number of calls depends on the size."""
    if len({len(calls) for calls in seen}) > 1:
        return []
    return [tuple(axis for axis in calls[0] if all(axis in one for one in calls)) for calls in zip(*seen, strict=True)]
