"""Checks the arguments of forward, and resizes the example."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from unroll.bundle.manifest import RESERVED_NAMES
from unroll.export.errors import COMPLEX, ExportError
from unroll.export.signature.outputs import DTYPES


@dataclass(frozen=True, slots=True)
class DeclaredArguments:
    """The user's declarations about forward's arguments.

    Attributes:
        static: arguments without time, given once at the start of a sequence.
        state: arguments that forward returns for its next call, each with the name of that output.
        batch_first: forward takes (batch, time, ...), otherwise (time, batch, ...).
    """

    static: frozenset[str]
    state: Mapping[str, str]
    batch_first: bool


@dataclass(frozen=True, slots=True)
class StateArgument:
    """An argument that is an initial state; one row is repeated for any batch.

    `axes` holds the batch axis of each tensor; it is empty if forward takes a single sequence.
    """

    tensors: tuple[Tensor, ...]
    axes: tuple[int, ...]
    structure: Any

    def __deepcopy__(self, memo: Any) -> "StateArgument":
        return self  # immutable, and copying a pytree structure warns

    def expand(self, batch: int) -> Any:
        """Repeat one row `batch` times. `batch` is symbolic while forward is traced."""
        if not self.axes:
            return pytree.tree_unflatten(list(self.tensors), self.structure)
        rows = [t.narrow(axis, 0, 1) for t, axis in zip(self.tensors, self.axes, strict=True)]
        sizes = [[batch if i == axis else -1 for i in range(t.dim())] for t, axis in zip(rows, self.axes, strict=True)]
        expanded = [row.expand(size) for row, size in zip(rows, sizes, strict=True)]
        return pytree.tree_unflatten(expanded, self.structure)


def check_types(module: Any, example: Any) -> None:
    """Raise ExportError(input) unless these are a module, or a program, and forward's arguments by name."""
    if not isinstance(module, (nn.Module, ExportedProgram)):
        what = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        raise ExportError("input", f"give an instance of nn.Module to export, not {what}")
    if not isinstance(example, dict) or not all(isinstance(name, str) for name in example):
        raise ExportError("input", "give the example inputs as a dict of tensors by the names of forward's arguments")


def check_arguments(model: nn.Module, example: dict[str, Any]) -> None:
    """Raise ExportError(input) unless forward can be called with these names, (dtype) for unsupported dtypes."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**example)
    except TypeError as error:
        raise ExportError(
            "input",
            f"forward cannot be called with {', '.join(example) or 'nothing'}: {error}{_missing(signature, example)}",
        ) from None
    for name, value in example.items():
        for leaf in [value.data] if isinstance(value, PackedSequence) else pytree.tree_leaves(value):
            if not isinstance(leaf, Tensor):
                raise ExportError("input", f"input {name!r} holds a {type(leaf).__name__}; give tensors only")
            if leaf.dtype not in DTYPES:
                change = COMPLEX if leaf.is_complex() else "use float32, int64, int32 or bool"
                raise ExportError("dtype", f"input {name!r} is {leaf.dtype}; {change}")


def _missing(signature: inspect.Signature, example: dict[str, Any]) -> str:
    """A remedy for the first argument without a value and without a default."""
    named = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    left = [p.name for p in signature.parameters.values() if p.kind in named and p.default is p.empty]
    name = next((name for name in left if name not in example), None)
    if name is None or not example:
        return ""
    return (
        f". If {name!r} is the state of a recurrent layer, make it None by default ({name}=None), or add its initial "
        "value to the example inputs of unroll.export. If forward returns it for the next call, name the output: "
        f"--state {name}:DTYPE:SHAPE=OUTPUT, or state={{{name!r}: OUTPUT}}"
    )


def alike_rows(tensor: Tensor, batch: int) -> list[int]:
    """The axes along which a tensor may be a batch of equal rows."""
    return [
        axis
        for axis in range(tensor.dim())
        if tensor.shape[axis] == batch and torch.equal(tensor, tensor.narrow(axis, 0, 1).expand_as(tensor))
    ]


def check_static(static: dict[str, Any], batch: int, unbatched: bool) -> dict[str, Tensor]:
    """Check the inputs without time, which must be (batch, ...). Raises ExportError(input)."""
    for name, value in static.items():
        if not isinstance(value, Tensor) or value.dim() < 1 or len(value) != batch or unbatched:
            raise ExportError(
                "input", f"static input {name!r} must be a tensor (batch, ...) with the batch of the other inputs"
            )
        if not value.is_floating_point() and value.abs().max() >= 2**24:
            raise ExportError(
                "input", f"static input {name!r} has values of 2**24 or more, which float32 does not represent exactly"
            )
    return static


def resized(
    example: dict[str, Any], size: tuple[int, int], static: frozenset[str], batch_first: bool
) -> dict[str, Any]:
    """Change the example's batch size and length, by repeating or dropping rows and steps."""
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
    """Convert the inputs to (batch, time, ...); all must share both. Raises ExportError(batch_time | input)."""
    layout = "(batch, time, ...)" if batch_first else "(time, batch, ...)"
    for name, value in example.items():
        if name in RESERVED_NAMES:
            raise ExportError(
                "input", f"input {name!r}: the bundle uses this name itself; rename the argument of forward"
            )
        if not isinstance(value, Tensor):
            raise ExportError("input", f"input {name!r} is a {type(value).__name__}; give a tensor {layout}")
    if unbatched:
        if any(value.dim() > 2 for value in example.values()):
            raise ExportError(
                "unbatched",
                f"a recurrent layer gets a 2-D tensor, which is one sequence; pass it, and the inputs, as {layout}",
            )
        example, batch_first = {name: value.unsqueeze(0) for name, value in example.items()}, True
    first = next(iter(example))
    for name in example:
        if example[name].dim() < 2 or example[name].shape[:2] != example[first].shape[:2]:
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in example.items())
            raise ExportError(
                "batch_time",
                f"every input must be {layout} with the same batch and time: {shapes}; list inputs without time in "
                "`static`, and give --time-last (time_last=True) if the time is last",
            )
        if min(example[name].shape) < 1:
            raise ExportError("input", f"input {name!r} is empty: {tuple(example[name].shape)}")
    return {name: t if batch_first else t.transpose(0, 1) for name, t in example.items()}
