"""The state row: the offset of each part of the state, and the conversion of any dtype to its floats."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unroll.bundle import StateSlot
from unroll.export.lifting.tape import Call, Key, call_count

#: An integer is stored as two digits in this base; float32 represents each exactly.
_BASE = 2**23

_INTEGERS = {torch.bool, torch.int64, torch.int32, torch.int16}


@dataclass(frozen=True, slots=True)
class Layout:
    """The slots of the state row."""

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
        """Split rows (batch, state_size) into the initial states of the calls."""
        pieces = row.split([slot.size for slot in self.slots], dim=1)
        grouped: dict[Key, list[Tensor]] = {}
        for slot, piece in zip(self.slots, pieces, strict=True):
            grouped.setdefault((slot.module, slot.call), []).append(piece)
        return grouped

    def pack(self, calls: list[Call], *, start: bool = False) -> Tensor:
        """Join the final states of the calls, or their initial states, to rows (batch, state_size)."""
        if Layout.of(calls) != self:
            raise call_count(calls[-1].module if calls else self.slots[0].module)
        return torch.cat([part for call in calls for part in (call.start if start else call.final)], dim=1)


def fits_row(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype in _INTEGERS


def to_row(values: Tensor) -> Tensor:
    """Convert (batch, size) of any dtype to floats. An integer takes two, since float32 is exact only up to 2**24."""
    if not values.is_floating_point() and values.dtype != torch.bool:
        low = torch.remainder(values, _BASE)
        values = torch.cat([torch.div(values - low, _BASE, rounding_mode="trunc"), low], 1)
    dtype = torch.get_default_dtype()
    return values if values.dtype == dtype else values.to(dtype)


def from_row(row: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_row`. Floats keep the precision of the row."""
    if dtype.is_floating_point:
        return row
    if dtype == torch.bool:
        return row > 0.5
    high, low = row.long().chunk(2, 1)
    return (high * _BASE + low).to(dtype)
