"""The state row: the place of each part of the state, and the conversion of any dtype to its floats."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unroll.bundle import StateSlot
from unroll.export.lifting.tape import Call, Key, call_count

#: A count is two digits of this base, each of which float32 has exactly.
_BASE = 2**23

_INTEGERS = {torch.bool, torch.int64, torch.int32, torch.int16}


@dataclass(frozen=True, slots=True)
class Layout:
    """The place of each part of the state in the row."""

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


def fits_row(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype in _INTEGERS


def to_row(values: Tensor) -> Tensor:
    """(batch, size) of any dtype as floats of the row. An integer takes two of them, since float32 ends at 2**24."""
    if values.is_floating_point():
        return values
    if values.dtype != torch.bool:
        low = torch.remainder(values, _BASE)
        values = torch.cat([torch.div(values - low, _BASE, rounding_mode="trunc"), low], 1)
    return values.to(torch.get_default_dtype())


def from_row(row: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_row`. A float keeps the precision of the row."""
    if dtype.is_floating_point:
        return row
    if dtype == torch.bool:
        return row > 0.5
    high, low = row.long().chunk(2, 1)
    return (high * _BASE + low).to(dtype)
