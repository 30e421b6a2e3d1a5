"""Finds the arguments that forward passes on as the initial state of a recurrent layer, or as lengths for packing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from unroll.export.errors import ExportError
from unroll.export.lifting.tape import Call
from unroll.export.signature.arguments import StateArgument, alike_rows

#: Runs forward with these arguments and returns the calls of its recurrent layers.
Record = Callable[[dict[str, Any]], list[Call]]


def state_arguments(example: dict[str, Any], record: Record, unbatched: bool) -> dict[str, StateArgument]:
    """Find the arguments that reach a recurrent layer unchanged, as its initial state.

    The search passes random values, and looks for them at the layers.

    Raises:
        ExportError: initial_state, if the rows of such a state differ: the model's initial state has a single row.
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
        raise ExportError("input", "every input is an initial state; add the inputs of each time step to the example")
    return found


def _row_axis(name: str, tensor: Tensor, batch: int) -> int:
    if axes := alike_rows(tensor, batch):
        return 1 if 1 in axes else axes[0]
    raise ExportError(
        "initial_state",
        f"input {name!r} is the initial state of a recurrent layer, and its rows differ; give the initial state of a "
        "new client, the same in every row, or omit it",
    )


def length_arguments(example: dict[str, Any], packed_with: Callable[[dict[str, Any]], list[Tensor]]) -> frozenset[str]:
    """Find the arguments that forward uses as lengths for packing: changing one changes the packed lengths.

    Args:
        example: the candidate arguments.
        packed_with: runs forward with these arguments, and returns the lengths that it packs with.
    """
    found = set()
    for name, value in example.items():
        if isinstance(value, Tensor) and value.dim() == 1 and value.dtype in {torch.int64, torch.int32}:
            other = torch.arange(1, len(value) + 1).clamp(max=int(value.max())).to(value.dtype)
            lengths = packed_with(example | {name: other})
            if lengths and all(torch.equal(one, other.long()) for one in lengths):
                found.add(name)
    return frozenset(found)
