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
        if func in _FUNCTIONS and len(args) + len(kwargs) == 1:
            tensor = args[0] if args else kwargs["input"]
            self.seen.append(tuple(axis for axis, size in enumerate(tensor.shape) if size == 1))
        return func(*args, **kwargs)


class KeepSqueezes(Observer):
    """Makes each call drop the recorded axes."""

    def __init__(self, squeezes: Squeezes) -> None:
        self._left = iter(squeezes)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS and len(args) + len(kwargs) == 1:
            tensor = args[0] if args else kwargs["input"]
            axes = next(self._left, None)
            if axes is not None:
                return torch.squeeze(tensor, axes)
        return func(*args, **kwargs)


def common(seen: list[Squeezes]) -> Squeezes:
    """The axes that the calls drop at every recorded size; empty if the number of calls depends on the size."""
    if len({len(calls) for calls in seen}) > 1:
        return []
    return [tuple(axis for axis in calls[0] if all(axis in one for one in calls)) for calls in zip(*seen, strict=True)]
