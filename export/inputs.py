"""Sorts forward's arguments: inputs of every time step, and states that forward hands straight to a recurrent layer."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bundle.manifest import RESERVED_NAMES
from export.errors import ExportError
from export.lift import Call
from export.outputs import DTYPES

#: Runs forward with these arguments and returns the calls its recurrent layers made.
Record = Callable[[dict[str, Any]], list[Call]]


@dataclass(frozen=True, slots=True)
class StateArgument:
    """An argument that is an initial state: one row of it, to be repeated for any batch."""

    tensors: tuple[Tensor, ...]
    axes: tuple[int, ...]
    structure: Any

    def __deepcopy__(self, memo: Any) -> "StateArgument":
        return self  # never changed, and copying a pytree's structure warns

    def expand(self, batch: int) -> Any:
        """`batch` may be symbolic, while forward is being traced."""
        rows = [t.narrow(axis, 0, 1) for t, axis in zip(self.tensors, self.axes, strict=True)]
        sizes = [[batch if i == axis else -1 for i in range(t.dim())] for t, axis in zip(rows, self.axes, strict=True)]
        expanded = [row.expand(size) for row, size in zip(rows, sizes, strict=True)]
        return pytree.tree_unflatten(expanded, self.structure)


def check_arguments(model: nn.Module, example: dict[str, Any]) -> None:
    """Raises ExportError(input) unless forward can be called with these names, (dtype) for other dtypes."""
    try:
        inspect.signature(model.forward).bind(**example)
    except TypeError as error:
        raise ExportError(
            "input", f"forward cannot be called with {', '.join(example) or 'nothing'}: {error}"
        ) from None
    for name, value in example.items():
        for leaf in pytree.tree_leaves(value):
            if not isinstance(leaf, Tensor):
                raise ExportError("input", f"input {name!r} holds a {type(leaf).__name__}; give tensors")
            if leaf.dtype not in DTYPES:
                raise ExportError("dtype", f"input {name!r} is {leaf.dtype}; use float32, int64, int32 or bool")


def state_arguments(example: dict[str, Any], record: Record) -> dict[str, StateArgument]:
    """The arguments that reach a recurrent layer as its initial state, value by value, and nothing else does.

    Found by putting random values in their place. Raises ExportError(initial_state) if such a state is not the
    same for all rows: it becomes the model's initial state, which has one row.
    """
    found = {}
    for name, value in example.items():
        tensors, structure = pytree.tree_flatten(value)
        if not tensors or not all(tensor.is_floating_point() for tensor in tensors):
            continue
        random = [
            torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7)) + i
            for i, tensor in enumerate(tensors)
        ]
        calls = record(example | {name: pytree.tree_unflatten(random, structure)})
        passed = torch.cat([piece.flatten() for call in calls for layer in call.passed for piece in layer])
        if all(torch.isin(tensor, passed).all() for tensor in random):
            axes = tuple(_row_axis(name, tensor, calls[0].batch) for tensor in tensors)
            found[name] = StateArgument(tuple(tensors), axes, structure)
    if len(found) == len(example):
        raise ExportError("input", "every input is an initial state; give an example of what arrives at each time step")
    return found


def _row_axis(name: str, tensor: Tensor, batch: int) -> int:
    candidates = [
        axis for axis in (1, 0, *range(2, tensor.dim())) if axis < tensor.dim() and tensor.shape[axis] == batch
    ]
    for axis in candidates:
        if torch.equal(tensor, tensor.narrow(axis, 0, 1).expand_as(tensor)):
            return axis
    raise ExportError(
        "initial_state",
        f"input {name!r} is the initial state of a recurrent layer, and its rows differ; give the one state that a "
        "new client starts from in every row, or leave it out",
    )


def check_inputs(example: dict[str, Tensor], batch_first: bool) -> dict[str, Tensor]:
    """The example inputs as (batch, time, ...); they must share both. Raises ExportError(batch_time | input)."""
    layout = "(batch, time, ...)" if batch_first else "(time, batch, ...)"
    for name, value in example.items():
        if name in RESERVED_NAMES:
            raise ExportError("input", f"input {name!r}: the bundle uses this name itself; rename forward's argument")
        if not isinstance(value, Tensor):
            raise ExportError("input", f"input {name!r} is a {type(value).__name__}; give a tensor {layout}")
    first = next(iter(example))
    for name in example:
        if example[name].dim() < 2 or example[name].shape[:2] != example[first].shape[:2]:
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in example.items())
            raise ExportError("batch_time", f"every input must be {layout} with the same batch and time: {shapes}")
        if min(example[name].shape) < 1:
            raise ExportError("input", f"input {name!r} is empty: {tuple(example[name].shape)}")
    return {name: t if batch_first else t.transpose(0, 1) for name, t in example.items()}
