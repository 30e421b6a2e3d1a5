"""Sorts forward's arguments: inputs of every time step, states handed straight to a recurrent layer, and lengths."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from unroll.bundle.manifest import RESERVED_NAMES
from unroll.export.errors import ExportError
from unroll.export.outputs import DTYPES
from unroll.export.tape import Call

#: Runs forward with these arguments and returns the calls its recurrent layers made.
Record = Callable[[dict[str, Any]], list[Call]]


@dataclass(frozen=True, slots=True)
class StateArgument:
    """An argument that is an initial state: one row of it, to be repeated for any batch.

    axes: where the batch is in each tensor; none if forward takes one sequence only.
    """

    tensors: tuple[Tensor, ...]
    axes: tuple[int, ...]
    structure: Any

    def __deepcopy__(self, memo: Any) -> "StateArgument":
        return self  # never changed, and copying a pytree's structure warns

    def expand(self, batch: int) -> Any:
        """`batch` may be symbolic, while forward is being traced."""
        if not self.axes:
            return pytree.tree_unflatten(list(self.tensors), self.structure)
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
        for leaf in [value.data] if isinstance(value, PackedSequence) else pytree.tree_leaves(value):
            if not isinstance(leaf, Tensor):
                raise ExportError("input", f"input {name!r} holds a {type(leaf).__name__}; give tensors")
            if leaf.dtype not in DTYPES:
                raise ExportError("dtype", f"input {name!r} is {leaf.dtype}; use float32, int64, int32 or bool")


def state_arguments(example: dict[str, Any], record: Record, unbatched: bool) -> dict[str, StateArgument]:
    """The arguments that reach a recurrent layer as its initial state, value by value, and nothing else does.

    Found by putting random values in their place. Raises ExportError(initial_state) if such a state is not the
    same for all rows: it becomes the model's initial state, which has one row.
    """
    found = {}
    for name, value in example.items():
        tensors, structure = pytree.tree_flatten(value)
        if (
            not tensors
            or isinstance(value, PackedSequence)
            or not all(tensor.is_floating_point() for tensor in tensors)
        ):
            continue
        random = [
            torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7)) + i
            for i, tensor in enumerate(tensors)
        ]
        calls = record(example | {name: pytree.tree_unflatten(random, structure)})
        asked = torch.cat([tensor.flatten() for call in calls for tensor in call.asked] or [torch.empty(0)])
        if all(torch.isin(tensor, asked).all() for tensor in random):
            axes = () if unbatched else tuple(_row_axis(name, tensor, calls[0].batch) for tensor in tensors)
            found[name] = StateArgument(tuple(tensors), axes, structure)
    if example and len(found) == len(example):
        raise ExportError("input", "every input is an initial state; give an example of what arrives at each time step")
    return found


def alike_rows(tensor: Tensor, batch: int) -> list[int]:
    """The axes along which a tensor may be a batch of rows that are all alike."""
    return [
        axis
        for axis in range(tensor.dim())
        if tensor.shape[axis] == batch and torch.equal(tensor, tensor.narrow(axis, 0, 1).expand_as(tensor))
    ]


def _row_axis(name: str, tensor: Tensor, batch: int) -> int:
    if axes := alike_rows(tensor, batch):
        return 1 if 1 in axes else axes[0]
    raise ExportError(
        "initial_state",
        f"input {name!r} is the initial state of a recurrent layer, and its rows differ; give the one state that a "
        "new client starts from in every row, or leave it out",
    )


def length_arguments(example: dict[str, Any], packed_with: Callable[[dict[str, Any]], list[Tensor]]) -> frozenset[str]:
    """The arguments that forward packs its sequences with: other values there are the lengths it packs with.

    packed_with: runs forward with these arguments, and returns the lengths.
    """
    found = set()
    for name, value in example.items():
        if isinstance(value, Tensor) and value.dim() == 1 and value.dtype in {torch.int64, torch.int32}:
            other = torch.arange(1, len(value) + 1).clamp(max=int(value.max())).to(value.dtype)
            lengths = packed_with(example | {name: other})
            if lengths and all(torch.equal(one, other.long()) for one in lengths):
                found.add(name)
    return frozenset(found)


def check_static(static: dict[str, Any], batch: int, unbatched: bool) -> dict[str, Tensor]:
    """The example's inputs without time, (batch, ...). Raises ExportError(input)."""
    for name, value in static.items():
        if not isinstance(value, Tensor) or value.dim() < 1 or len(value) != batch or unbatched:
            raise ExportError("input", f"static input {name!r} must be a tensor (batch, ...), with the others' batch")
        if not value.is_floating_point() and value.abs().max() >= 2**24:
            raise ExportError("input", f"static input {name!r} has values of 2**24 or more, which float32 cannot keep")
    return static


def resized(
    example: dict[str, Any], size: tuple[int, int], static: frozenset[str], batch_first: bool
) -> dict[str, Any]:
    """The example with another batch size and length: its rows and steps repeated, or the first of them."""
    batch, time = size
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    sizes = next((leaf.shape[:2] for leaf in tensors if leaf.dim() > 1), tensors[0].shape[:1])
    rows, steps = (0, 1) if batch_first else (1, 0)

    def change(leaf: Tensor) -> Tensor:
        if leaf.dim() > 1 and leaf.shape[:2] == sizes:
            return _cycle(_cycle(leaf, rows, batch), steps, time)
        if leaf.dim() == 1 and not leaf.is_floating_point() and len(leaf) == sizes[rows]:
            return torch.full((batch,), min(time, int(leaf.max()))).to(leaf.dtype)
        axes = [axis for axis in (1, 0)[leaf.dim() < 3 :] if leaf.dim() > axis and leaf.shape[axis] == sizes[rows]]
        return _cycle(leaf, axes[0], batch) if axes else leaf

    return {
        name: _cycle(value, 0, batch) if name in static else pytree.tree_map_only(Tensor, change, value)
        for name, value in example.items()
    }


def _cycle(tensor: Tensor, axis: int, size: int) -> Tensor:
    return tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])


def check_inputs(example: dict[str, Tensor], batch_first: bool, unbatched: bool) -> dict[str, Tensor]:
    """The example inputs as (batch, time, ...); they must share both. Raises ExportError(batch_time | input)."""
    layout = "(batch, time, ...)" if batch_first else "(time, batch, ...)"
    for name, value in example.items():
        if name in RESERVED_NAMES:
            raise ExportError("input", f"input {name!r}: the bundle uses this name itself; rename forward's argument")
        if not isinstance(value, Tensor):
            raise ExportError("input", f"input {name!r} is a {type(value).__name__}; give a tensor {layout}")
    if unbatched:
        if any(value.dim() > 2 for value in example.values()):
            raise ExportError(
                "unbatched", f"a recurrent layer is given a 2-D tensor, one sequence; give the inputs as {layout}"
            )
        example, batch_first = {name: value.unsqueeze(0) for name, value in example.items()}, True
    first = next(iter(example))
    for name in example:
        if example[name].dim() < 2 or example[name].shape[:2] != example[first].shape[:2]:
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in example.items())
            raise ExportError(
                "batch_time",
                f"every input must be {layout} with the same batch and time: {shapes}; name those in `static` that are "
                "given once when a sequence begins",
            )
        if min(example[name].shape) < 1:
            raise ExportError("input", f"input {name!r} is empty: {tuple(example[name].shape)}")
    return {name: t if batch_first else t.transpose(0, 1) for name, t in example.items()}
