"""The tape: the states that a lifted model reads and writes, call by call.

The key of a call is (path of the module, index of the call). Its state is a list of parts, each (batch, size), whose
meaning only the lifted layer knows.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unroll.bundle.manifest import Kind
from unroll.export.errors import ExportError

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Part:
    """Names a part of a layer's state: see `StateSlot`."""

    kind: Kind
    layer: int = 0
    direction: Literal["forward", "reverse"] = "forward"


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a lifted layer.

    Attributes:
        start, final: its initial and final state, in parts, each (batch, size).
        asked: the tensors that forward passed as the initial state.
        returned: the tensors that forward received as the final state.
    """

    module: str
    index: int
    parts: tuple[Part, ...]
    batch: int
    time: int
    start: list[Tensor]
    final: list[Tensor]
    asked: tuple[Tensor, ...] = ()
    returned: tuple[Tensor, ...] = ()


class Tape:
    """The states that the lifted layers of one model read and write during one forward pass.

    With `given`, calls start from it and ignore the state that forward passes, except calls in `computed` on rows that
    are `fresh`. With `lens`, layers run as the operators of the bundle's graph; without it, as PyTorch's own.
    """

    def __init__(self) -> None:
        #: Calls whose initial state forward computes from its inputs, so that it differs between sequences.
        self.computed: frozenset[Key] = frozenset()
        #: Calls of the last recorded pass that started from a tensor in `from_inputs`.
        self.computed_starts: set[Key] = set()
        self.start(None, None)

    def start(self, given: dict[Key, list[Tensor]] | None, lens: Tensor | None) -> None:
        self.given, self.lens = given, lens
        #: (batch, 1): is the row at the start of its sequence?
        self.fresh: Tensor | None = None
        self.calls: list[Call] = []
        #: The arguments of each packing: the rows' lengths, and the number of time steps.
        self.lengths: list[tuple[Tensor, int]] = []
        #: Tensors computed from the inputs, while they are tracked: see `dataflow`.
        self.from_inputs: Container[Tensor] = ()
        #: Was a layer given one sequence without a batch axis?
        self.unbatched = False

    def begin(self, path: str, asked: Callable[[], list[Tensor]]) -> tuple[int, list[Tensor]]:
        """Begin a call; returns its index among the module's calls, and its initial state.

        Args:
            path: the path of the module.
            asked: computes the state that forward passes.

        Raises:
            ExportError: calls_depend_on_time, if the row has no state for the call.
        """
        index = sum(call.module == path for call in self.calls)
        if self.given is None:
            start = asked()
            if any(tensor in self.from_inputs for tensor in start):
                self.computed_starts.add((path, index))
            return index, start
        if (path, index) not in self.given:
            raise call_count(path)
        kept = self.given[path, index]
        if self.fresh is not None and (path, index) in self.computed:
            return index, [torch.where(self.fresh, one, other) for one, other in zip(asked(), kept, strict=True)]
        return index, kept


def call_count(path: str, *, by_batch: bool = False) -> ExportError:
    """by_batch: it depends on the batch size, not on the length."""
    on, whole, over = ("batch size", "batch", "its rows") if by_batch else ("length", "sequence", "time steps")
    return ExportError(
        "calls_depend_on_time",
        f"the number of calls of layer {path!r} depends on the {on}; call it once on the whole {whole} instead of "
        f"looping over {over}",
    )


def count_up(count: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    """0, 1, ... without torch.arange, which `history` would take for a call of the user's."""
    return torch.ops.aten.arange.default(count, dtype=dtype)
