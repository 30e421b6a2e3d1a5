"""Runs a module that loops over the rows of a batch in Python for all rows at once: torch.vmap of the code for one row.

Code may write a row's values into a tensor that belongs to no row, such as `torch.empty` or an attribute of the module,
or start from one. Each row therefore gets its own copy of such tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from unroll.export.lifting.kept_values import NOT_OWN
from unroll.export.lifting.recording import CREATORS
from unroll.export.lifting.vmap_rules import OneByOne


class ByRow(nn.Module):
    """`module`, which takes and returns tensors. inputs, outputs: their batch axes."""

    def __init__(self, module: nn.Module, inputs: list[int | None], outputs: list[int | None]) -> None:
        super().__init__()
        self.module, self._inputs, self._outputs = module, tuple(inputs), tuple(outputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        mapped: Any = torch.vmap(self._row, self._inputs, self._outputs)  # type: ignore[arg-type]
        made: tuple[Tensor, ...] = mapped(*tensors)
        return made

    def _row(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        batch = [t if axis is None else t.unsqueeze(axis) for t, axis in zip(tensors, self._inputs, strict=True)]
        seed = next(t for t, axis in zip(batch, self._inputs, strict=True) if axis is not None).flatten()[0]
        with OneByOne(), _Created(partial(_own, seed)), _attributes(self.module, partial(_own, seed)):
            made = self.module(*batch)
        return tuple(t if axis is None else t.squeeze(axis) for t, axis in zip(made, self._outputs, strict=True))


def _own(seed: Tensor, tensor: Tensor) -> Tensor:
    """The row's own copy of a tensor. seed: a number of the row, which ties the copy to it under torch.vmap."""
    zero = torch.zeros_like(seed, dtype=tensor.dtype)
    return tensor | zero if tensor.dtype == torch.bool else tensor + zero


class _Created(TorchFunctionMode):
    """Within it, each row gets its own copy of a tensor that is created from sizes only."""

    def __init__(self, own: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._own = own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return self._own(result) if getattr(func, "__name__", "") in CREATORS else result


@contextmanager
def _attributes(model: nn.Module, own: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, each row gets its own copy of the tensors that are attributes. Restores all attributes at the end."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        for now, values in before:
            changed = {name: value for name, value in values.items() if name not in NOT_OWN}
            now.update(pytree.tree_map_only(Tensor, own, changed))
        yield
    finally:
        for now, values in before:
            now.clear()
            now.update(values)
