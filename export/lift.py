"""The tape: what a lifted model reads as state and leaves as state, call by call, and how it lies in the packed row.

A call is known by (path of the module, how often it was called before). Its state is a list of parts, each
(batch, size); what they mean is the lifted layer's own business.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bundle import StateSlot
from bundle.manifest import Kind
from export.errors import ExportError

Key = tuple[str, int]

_HALF = 2**23


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a layer's state: see `StateSlot`."""

    kind: Kind
    layer: int = 0
    direction: Literal["forward", "reverse"] = "forward"


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a lifted layer, as it happened.

    `passed` is the initial state that forward asked for (zeros if it asked for none), whatever state was then used, and
    `final` the state it reached, part by part. `asked` are the very tensors that it passed, and `returned` those that
    it got back as final state.
    """

    module: str
    index: int
    parts: tuple[Part, ...]
    batch: int
    time: int
    passed: list[Tensor]
    final: list[Tensor]
    asked: tuple[Tensor, ...] = ()
    returned: tuple[Tensor, ...] = ()


class Tape:
    """What the lifted layers of one model read and write during one forward pass.

    With `given`, calls start from it and ignore the state forward passes. With `lens`, they run as what becomes the
    bundle's graph; without, as PyTorch's own layers.
    """

    def __init__(self) -> None:
        self.start(None, None)

    def start(self, given: dict[Key, list[Tensor]] | None, lens: Tensor | None) -> None:
        self.given, self.lens = given, lens
        self.calls: list[Call] = []
        #: What forward packs a sequence with: the rows' lengths, and the time steps there are.
        self.lengths: list[tuple[Tensor, int]] = []
        #: Was a layer given one sequence without a batch axis?
        self.unbatched = False

    def begin(self, path: str, passed: list[Tensor]) -> tuple[int, list[Tensor]]:
        """The number of this call, and the state it is to start from."""
        index = sum(call.module == path for call in self.calls)
        if self.given is None:
            return index, passed
        if (path, index) not in self.given:
            raise call_count(path)
        return index, self.given[path, index]


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

    def pack(self, calls: list[Call], *, passed: bool = False) -> Tensor:
        """The final states (or those that forward `passed`) of every call -> (batch, state_size)."""
        if Layout.of(calls) != self:
            raise call_count(calls[-1].module if calls else self.slots[0].module)
        return torch.cat([part for call in calls for part in (call.passed if passed else call.final)], dim=1)


def call_count(path: str) -> ExportError:
    return ExportError(
        "calls_depend_on_time",
        f"layer {path!r} is called a number of times that depends on the sequence's length; call it once on the "
        "whole sequence instead of looping over time steps",
    )


def to_row(values: Tensor) -> Tensor:
    """(batch, size) of any dtype as floats of the row; a count is in two of them, since float32 ends at 2**24."""
    if values.is_floating_point():
        return values
    if values.dtype != torch.bool:
        low = torch.remainder(values, _HALF)
        values = torch.cat([torch.div(values - low, _HALF, rounding_mode="trunc"), low], 1)
    return values.to(torch.get_default_dtype())


def from_row(row: Tensor, dtype: torch.dtype) -> Tensor:
    """What `to_row` was given. A float is of the precision that the row has."""
    if dtype.is_floating_point:
        return row
    if dtype == torch.bool:
        return row > 0.5
    high, low = row.long().chunk(2, 1)
    return (high * _HALF + low).to(dtype)
