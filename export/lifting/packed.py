"""PackedSequence, lifted: while the lifted model runs, packing keeps the padded tensor, batch first and unsorted.

The lengths of the rows are the service's `sequence_lens`. The `data` of a packed sequence is (batch, time, ...) instead
of (steps, ...), which makes no difference to code that works on its last axis.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from unroll.export.errors import ExportError
from unroll.export.lifting.tape import Tape, count_up

_TAPE: ContextVar[Tape] = ContextVar("unroll_tape")


@contextmanager
def padded(tape: Tape) -> Iterator[None]:
    """Replace the code of PyTorch's packing functions, so that it does not matter how the user's code imported them."""
    ours: list[tuple[Any, Any]] = [(rnn.pack_padded_sequence, _pack_code), (rnn.pad_packed_sequence, _pad_code)]
    before = [function.__code__ for function, _ in ours]
    token = _TAPE.set(tape)
    try:
        for function, replacement in ours:
            function.__code__ = replacement.__code__
        yield
    finally:
        for (function, _), code in zip(ours, before, strict=True):
            function.__code__ = code
        _TAPE.reset(token)


def like(sequence: PackedSequence, data: Tensor) -> PackedSequence:
    return PackedSequence(data, sequence.batch_sizes)


def as_argument(data: Tensor, lens: Tensor) -> PackedSequence:
    """Wrap a padded input (batch, time, ...) for a forward that takes a PackedSequence."""
    return PackedSequence(data, lens.long())


def as_padded(returned: Any) -> Any:
    """Replace each PackedSequence in the result of a lifted forward by its padded tensor (batch, time, ...)."""

    def is_packed(value: Any) -> bool:
        return isinstance(value, PackedSequence)

    return pytree.tree_map(lambda value: value.data if is_packed(value) else value, returned, is_leaf=is_packed)


def pack(x: Tensor, lengths: Any, batch_first: bool) -> PackedSequence:
    tape = _TAPE.get()
    data = x if batch_first else x.transpose(0, 1)
    lengths = torch.as_tensor(lengths).long()
    tape.lengths.append((lengths, data.shape[1]))
    return PackedSequence(data, lengths)


def pad(sequence: PackedSequence, batch_first: bool, value: float, total_length: int | None) -> tuple[Tensor, Tensor]:
    lens, data = _TAPE.get().lens, sequence.data
    if total_length is not None and total_length != data.shape[1]:
        raise ExportError(
            "packed_sequence", f"pad_packed_sequence pads to {total_length} steps; pad to the length of the input"
        )
    lengths = sequence.batch_sizes
    if lens is not None:
        alive = count_up(data.shape[1]) < lens.unsqueeze(1)
        data = torch.where(alive.reshape(*alive.shape, *[1] * (data.dim() - 2)), data, value)
        lengths = lens.long()
    return (data if batch_first else data.transpose(0, 1)), lengths


# The bodies for PyTorch's functions. They run with the globals of PyTorch's module, so they import what they need.
def _pack_code(input, lengths, batch_first=False, enforce_sorted=True):  # type: ignore[no-untyped-def]
    from unroll.export.lifting.packed import pack

    return pack(input, lengths, batch_first)


def _pad_code(sequence, batch_first=False, padding_value=0.0, total_length=None):  # type: ignore[no-untyped-def]
    from unroll.export.lifting.packed import pad

    return pad(sequence, batch_first, padding_value, total_length)
