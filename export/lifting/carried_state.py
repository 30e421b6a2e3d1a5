"""State that forward passes to its next call: a cache that it takes and returns, or keeps in an attribute."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from unroll.export.errors import ExportError, attempt
from unroll.export.lifting.scan import Axes
from unroll.export.lifting.state_row import fits_row
from unroll.export.lifting.tape import Call, Part, Tape
from unroll.export.signature.arguments import StateArgument, alike_rows
from unroll.export.signature.outputs import continuing, leaves

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """One carried state.

    Attributes:
        name: its name in the state row.
        parts: the axes of its tensors.
        first: the initial value as parts of the row, each (1, size).
        structure: the pytree structure of its tensors.
    """

    name: str
    parts: tuple[Axes, ...]
    first: tuple[Tensor, ...]
    structure: Any

    def __deepcopy__(self, memo: Any) -> "Carried":
        return self  # immutable, and copying a pytree structure warns

    @classmethod
    def of_argument(cls, name: str, argument: StateArgument) -> "Carried":
        pairs = list(zip(argument.tensors, argument.axes, strict=True))
        parts = tuple(Axes(axis, None, tuple(tensor.shape), tensor.dtype) for tensor, axis in pairs)
        first = tuple(axes.flat(t.narrow(axis, 0, 1)) for axes, (t, axis) in zip(parts, pairs, strict=True))
        return cls(f"input {name}", parts, first, argument.structure)

    @classmethod
    def of_attribute(cls, name: str, first: Any, left: list[Any]) -> "Carried | None":
        """Build from the values that calls of three sizes left in the attribute; None without a row per client."""
        flat = [pytree.tree_flatten(value) for value in left]
        leaves, structure = [tensors for tensors, _ in flat], flat[0][1]
        if any(other != structure for _, other in flat) or not leaves[0]:
            return None
        if not all(isinstance(leaf, Tensor) and fits_row(leaf.dtype) for one in leaves for leaf in one):
            return None
        parts = [Axes.of(*tensors) for tensors in zip(*leaves, strict=True)]
        known = tuple(axes for axes in parts if axes is not None and axes.batch is not None and axes.time is None)
        if len(known) != len(parts):
            return None
        begin = [axes.flat(torch.zeros(axes.with_batch(1), dtype=axes.dtype)) for axes in known]
        given = pytree.tree_leaves(first)
        # An empty tensor such as torch.zeros(0) means "no initial value".
        if given and all(isinstance(tensor, Tensor) and tensor.numel() for tensor in given):
            if [t.dim() for t in given] != [len(axes.shape) for axes in known]:
                return None
            begin = [axes.flat(t.narrow(axes.batch or 0, 0, 1)) for axes, t in zip(known, given, strict=True)]
        return cls(name, known, tuple(begin), structure)

    def take(self, tape: Tape, batch: int) -> tuple[list[Tensor], Any]:
        """Read the state from the tape: as parts of the row, and in forward's structure."""
        dtype = torch.get_default_dtype()
        _, rows = tape.begin(self.name, lambda: [row.to(dtype).expand(batch, -1) for row in self.first])
        tensors = [axes.unflat(row) for axes, row in zip(self.parts, rows, strict=True)]
        return rows, pytree.tree_unflatten(tensors, self.structure)

    def leave(self, tape: Tape, rows: list[Tensor], tensors: list[Tensor], batch: int, time: int) -> None:
        """Write the state that forward returned for `rows` to the tape. Raises ExportError(output)."""
        for axes, tensor in zip(self.parts, tensors, strict=True):
            if tensor.dim() != len(axes.shape) or any(
                size != own
                for axis, (size, own) in enumerate(zip(tensor.shape, axes.shape, strict=True))
                if axis != axes.batch
            ):
                raise ExportError(
                    "output", f"{self.name!r} is returned as {tuple(tensor.shape)}; its shape must stay the same"
                )
        parts = tuple(Part("carry", number) for number in range(len(self.parts)))
        final = [axes.flat(tensor) for axes, tensor in zip(self.parts, tensors, strict=True)]
        tape.calls.append(Call(self.name, 0, parts, batch, time, rows, final))


def handed_on(
    model: nn.Module, example: dict[str, Any], state: Mapping[str, str], alone: Callable[[], dict[str, Any]], batch: int
) -> dict[str, StateArgument]:
    """Find the batch axes of the state arguments, which forward returns for its next call.

    Args:
        state: the output that continues each state argument, by name.
        alone: makes the other arguments for a batch of one.
        batch: batch size of the example.

    Raises:
        ExportError: input, if an output does not match its argument, or if the rows of a state differ.
    """
    copied = pytree.tree_map_only(Tensor, Tensor.clone, example)  # forward may change its states in place
    returned = leaves(attempt("the example", lambda: model(**copied)))
    for name in state:
        tensors = pytree.tree_leaves(example[name])
        if _shapes(returned, state[name], example[name]) != [tensor.shape for tensor in tensors]:
            there = ", ".join(f"{key or 'y'} {tuple(tensor.shape)}" for key, tensor in returned)
            raise ExportError(
                "input",
                f"state {name!r} is {', '.join(str(tuple(t.shape)) for t in tensors)}, and forward has no output "
                f"{state[name]!r} of that shape: it returns {there}",
            )
    choices = list(state_choices({name: example[name] for name in state}, batch))
    for found in choices:
        if len(choices) == 1 or _fits(model, alone(), found, state):
            return found
    raise ExportError(
        "input",
        f"state {', '.join(map(repr, state))}: give the initial state of a new client, the same in every row",
    )


def state_choices(values: Mapping[Key, Any], batch: int) -> Iterator[dict[Key, StateArgument]]:
    """The states with these initial values, for each choice of axes along which they may be `batch` equal rows."""
    flat = {key: pytree.tree_flatten(value) for key, value in values.items()}
    for axes in product(*(alike_rows(tensor, batch) for tensors, _ in flat.values() for tensor in tensors)):
        left = iter(axes)
        yield {
            key: StateArgument(tuple(tensors), tuple(next(left) for _ in tensors), structure)
            for key, (tensors, structure) in flat.items()
        }


def _fits(
    model: nn.Module, arguments: dict[str, Any], found: dict[str, StateArgument], state: Mapping[str, str]
) -> bool:
    """Does forward accept one row of the states, and return one?"""
    one = {name: pytree.tree_map_only(Tensor, Tensor.clone, argument.expand(1)) for name, argument in found.items()}
    try:
        returned = leaves(attempt("a batch of one", lambda: model(**arguments, **one)))
    except ExportError:
        return False
    return all(
        _shapes(returned, state[name], one[name]) == [t.shape for t in pytree.tree_leaves(one[name])] for name in found
    )


def _shapes(returned: list[tuple[str, Tensor]], output: str, state: Any) -> list[torch.Size]:
    return [returned[index][1].shape for index in continuing(returned, output, state)]
