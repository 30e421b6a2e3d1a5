"""The tape: what a lifted model reads as state and leaves as state, call by call, and how it lies in the packed row.

A call is known by (path of the module, how often it was called before). Its state is a list of parts, each
(batch, size); what they mean is the lifted layer's own business.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unroll.bundle import StateSlot
from unroll.bundle.manifest import Kind
from unroll.export.errors import ExportError

Key = tuple[str, int]

#: A count is two digits of this base, each of which float32 has exactly.
_BASE = 2**23

_INTEGERS = {torch.bool, torch.int64, torch.int32, torch.int16}


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


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each part of the state lies in the packed row."""

    slots: tuple[StateSlot, ...]

    @classmethod
    def of(cls, calls: list[Call]) -> "Layout":
        slots: list[StateSlot] = []
        offset = 0
        for call in calls:
            for part, tensor in zip(call.parts, call.final, strict=True):
                size = int(tensor.shape[1])
                slots.append(StateSlot(call.module, call.index, part.layer, part.direction, part.kind, offset, size))
                offset += size
        return cls(tuple(slots))

    @property
    def size(self) -> int:
        return sum(slot.size for slot in self.slots)

    def unpack(self, row: Tensor) -> dict[Key, list[Tensor]]:
        """(batch, state_size) -> the initial state of every call."""
        pieces = row.split([slot.size for slot in self.slots], dim=1)
        grouped: dict[Key, list[Tensor]] = {}
        for slot, piece in zip(self.slots, pieces, strict=True):
            grouped.setdefault((slot.module, slot.call), []).append(piece)
        return grouped

    def pack(self, calls: list[Call], *, start: bool = False) -> Tensor:
        """The final states of every call, or those it started from -> (batch, state_size)."""
        if Layout.of(calls) != self:
            raise call_count(calls[-1].module if calls else self.slots[0].module)
        return torch.cat([part for call in calls for part in (call.start if start else call.final)], dim=1)


def call_count(path: str) -> ExportError:
    return ExportError(
        "calls_depend_on_time",
        f"layer {path!r} is called a number of times that depends on the sequence's length; call it once on the "
        "whole sequence instead of looping over time steps",
    )


def count_up(count: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    """torch.arange, for within forward: there that name is taken for the user's own, see `history`."""
    return torch.ops.aten.arange.default(count, dtype=dtype)


def fits_row(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype in _INTEGERS


def to_row(values: Tensor) -> Tensor:
    """(batch, size) of any dtype as floats of the row; a count is in two of them, since float32 ends at 2**24."""
    if values.is_floating_point():
        return values
    if values.dtype != torch.bool:
        low = torch.remainder(values, _BASE)
        values = torch.cat([torch.div(values - low, _BASE, rounding_mode="trunc"), low], 1)
    return values.to(torch.get_default_dtype())


def from_row(row: Tensor, dtype: torch.dtype) -> Tensor:
    """What `to_row` was given. A float is of the precision that the row has."""
    if dtype.is_floating_point:
        return row
    if dtype == torch.bool:
        return row > 0.5
    high, low = row.long().chunk(2, 1)
    return (high * _BASE + low).to(dtype)
