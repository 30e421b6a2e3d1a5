"""The tape: what a lifted model reads as state and leaves as state, call by call.

A call is known by (path of the module, how often it was called before). Its state is a list of parts, each
(batch, size); what they mean is the lifted layer's own business.
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
    """Which part of a layer's state: see `StateSlot`."""

    kind: Kind
    layer: int = 0
    direction: Literal["forward", "reverse"] = "forward"


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a lifted layer, as it happened.

    `start` is the state it started from, and `final` the one it reached, part by part. `asked` are the very tensors
    that forward passed, and `returned` those that it got back as final state.
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
    """What the lifted layers of one model read and write during one forward pass.

    With `given`, calls start from it and ignore the state forward passes; but for those in `computed`, while a row is
    `fresh`. With `lens`, they run as what becomes the bundle's graph; without, as PyTorch's own layers.
    """

    def __init__(self) -> None:
        #: Calls whose initial state forward computes from the inputs: not one for all.
        self.computed: frozenset[Key] = frozenset()
        #: Of the last pass that asked: the calls whose initial state was in `taint`.
        self.tainted: set[Key] = set()
        self.start(None, None)

    def start(self, given: dict[Key, list[Tensor]] | None, lens: Tensor | None) -> None:
        self.given, self.lens = given, lens
        #: (batch, 1): is this row at the beginning of its sequence?
        self.fresh: Tensor | None = None
        self.calls: list[Call] = []
        #: What forward packs a sequence with: the rows' lengths, and the time steps there are.
        self.lengths: list[tuple[Tensor, int]] = []
        #: Tensors that are computed from the inputs, if that is asked: see `dataflow`.
        self.taint: Container[Tensor] = ()
        #: Was a layer given one sequence without a batch axis?
        self.unbatched = False

    def begin(self, path: str, asked: Callable[[], list[Tensor]]) -> tuple[int, list[Tensor]]:
        """The number of this call, and the state it is to start from. asked: computes the one that forward asks for."""
        index = sum(call.module == path for call in self.calls)
        if self.given is None:
            start = asked()
            if any(tensor in self.taint for tensor in start):
                self.tainted.add((path, index))
            return index, start
        if (path, index) not in self.given:
            raise call_count(path)
        kept = self.given[path, index]
        if self.fresh is not None and (path, index) in self.computed:
            return index, [torch.where(self.fresh, one, other) for one, other in zip(asked(), kept, strict=True)]
        return index, kept


def call_count(path: str) -> ExportError:
    return ExportError(
        "calls_depend_on_time",
        f"layer {path!r} is called a number of times that depends on the sequence's length; call it once on the "
        "whole sequence instead of looping over time steps",
    )


def count_up(count: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    """torch.arange, for within forward: there that name is taken for the user's own, see `history`."""
    return torch.ops.aten.arange.default(count, dtype=dtype)
