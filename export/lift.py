"""Lifts the hidden state out of a model: a recurrent layer takes its state from a tape and leaves it there.

The layer stays an `nn.LSTM`, `nn.GRU` or `nn.RNN` for the user's code: only its class is replaced, on a copy,
by a subclass with another `forward`. A call is known by (path of the module, how often it was called before).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bundle import StateSlot
from export import ops
from export.errors import ExportError

#: The state of one call: for each layer, h (and c for an LSTM), each (directions, batch, hidden).
Layers = list[tuple[Tensor, ...]]

Native = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a recurrent layer, as it happened.

    `passed` is the initial state that forward asked for (zeros if it passed none), whatever state was then used;
    `returned` are the very tensors that forward got back as final state.
    """

    module: str
    index: int
    layers: int
    directions: int
    hidden: int
    kinds: tuple[str, ...]
    batch: int
    time: int
    passed: Layers
    final: Layers
    returned: tuple[Tensor, ...]

    @property
    def key(self) -> tuple[str, int]:
        return self.module, self.index


class Tape:
    """What the lifted layers of one model read and write during one forward pass.

    With `given`, calls start from it and ignore the state forward passes. With `lens`, they run as the custom
    op (what becomes an ONNX node); without, as PyTorch's own layer.
    """

    def __init__(self) -> None:
        self.start(None, None)

    def start(self, given: dict[tuple[str, int], Layers] | None, lens: Tensor | None) -> None:
        self.given, self.lens = given, lens
        self.calls: list[Call] = []

    def play(self, module: nn.RNNBase, native: Native, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        path = str(module.unroll_path)
        kind = _kind(module)
        if isinstance(x, PackedSequence):
            raise ExportError(
                "packed_sequence",
                f"layer {path!r} is given a PackedSequence; pass the padded tensor, the service handles lengths itself",
            )
        if x.dim() != 3:
            raise ExportError(
                "unbatched", f"layer {path!r} is given a {x.dim()}-D tensor; pass (batch, time, features)"
            )
        index = sum(call.module == path for call in self.calls)
        passed = _passed(module, kind, x, hx)
        start = passed
        if self.given is not None:
            if (path, index) not in self.given:
                raise call_count(path)
            start = self.given[path, index]
        if self.lens is None:
            joined = tuple(torch.cat(pieces) for pieces in zip(*start, strict=True))
            out, hidden = native(x, joined if kind == "LSTM" else joined[0])
            returned = hidden if kind == "LSTM" else (hidden,)
            final = _by_layer(module, returned)
        else:
            out, final = _run_ops(module, kind, x, self.lens, start)
            returned = tuple(torch.cat(pieces) for pieces in zip(*final, strict=True))
        batch, time = (x.shape[0], x.shape[1]) if module.batch_first else (x.shape[1], x.shape[0])
        directions = 2 if module.bidirectional else 1
        kinds = ("h", "c") if kind == "LSTM" else ("h",)
        shape = (module.num_layers, directions, module.hidden_size)
        self.calls.append(Call(path, index, *shape, kinds, batch, time, passed, final, returned))
        return out, returned if kind == "LSTM" else returned[0]


class LiftedLSTM(nn.LSTM):
    unroll_tape: Tape

    def forward(self, input: Any, hx: Any = None) -> Any:
        return self.unroll_tape.play(self, super().forward, input, hx)


class LiftedGRU(nn.GRU):
    unroll_tape: Tape

    def forward(self, input: Any, hx: Any = None) -> Any:
        return self.unroll_tape.play(self, super().forward, input, hx)


class LiftedRNN(nn.RNN):
    unroll_tape: Tape

    def forward(self, input: Any, hx: Any = None) -> Any:
        return self.unroll_tape.play(self, super().forward, input, hx)


_LIFTED: dict[type[nn.RNNBase], type[nn.RNNBase]] = {nn.LSTM: LiftedLSTM, nn.GRU: LiftedGRU, nn.RNN: LiftedRNN}


def lift(model: nn.Module) -> Tape:
    """Lift every recurrent layer of `model` in place; returns the tape they share."""
    tape = Tape()
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            # After the module's own class in the resolution order, so that a subclass of nn.LSTM keeps its
            # forward and reaches ours through super().
            lifted = next(lifted for base, lifted in _LIFTED.items() if isinstance(module, base))
            bases = (lifted,) if type(module) in _LIFTED else (type(module), lifted)
            module.__class__ = type(type(module).__name__, bases, {})
            module.unroll_tape = tape
            module.unroll_path = path or type(module).__name__
    return tape


def take_weights(model: nn.Module) -> None:
    """Keep the weights as ONNX wants them. After a forward, since a normalised weight is computed by one."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            for layer in range(module.num_layers):
                for name, weight in zip("wrb", ops.layer_weights(module, _kind(module), layer), strict=True):
                    module.register_buffer(f"onnx_{name}{layer}", weight, persistent=False)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each piece of state lies in the packed row."""

    slots: tuple[StateSlot, ...]

    @classmethod
    def of(cls, calls: list[Call]) -> "Layout":
        slots: list[StateSlot] = []
        offset = 0
        for call in calls:
            for layer in range(call.layers):
                for kind in call.kinds:
                    for direction in ("forward", "reverse")[: call.directions]:
                        slots.append(
                            StateSlot(call.module, call.index, layer, direction, kind, offset, call.hidden)  # type: ignore[arg-type]
                        )
                        offset += call.hidden
        return cls(tuple(slots))

    @property
    def size(self) -> int:
        return sum(slot.size for slot in self.slots)

    def unpack(self, row: Tensor) -> dict[tuple[str, int], Layers]:
        """(batch, state_size) -> the initial state of every call."""
        pieces = row.split([slot.size for slot in self.slots], dim=1)
        grouped: dict[tuple[str, int], dict[int, dict[str, list[Tensor]]]] = {}
        for slot, piece in zip(self.slots, pieces, strict=True):
            layer = grouped.setdefault((slot.module, slot.call), {}).setdefault(slot.layer, {})
            layer.setdefault(slot.kind, []).append(piece)
        return {
            key: [tuple(_join(pieces) for pieces in kinds.values()) for kinds in layers.values()]
            for key, layers in grouped.items()
        }

    def pack(self, calls: list[Call], *, passed: bool = False) -> Tensor:
        """The final states (or those that forward `passed`) of every call -> (batch, state_size)."""
        if Layout.of(calls) != self:
            raise call_count(calls[-1].module if calls else self.slots[0].module)
        return torch.cat(
            [
                direction.squeeze(0)
                for call in calls
                for layer in (call.passed if passed else call.final)
                for piece in layer
                for direction in piece.split(1)
            ],
            dim=1,
        )


def _join(directions: list[Tensor]) -> Tensor:
    return directions[0].unsqueeze(0) if len(directions) == 1 else torch.stack(directions)


def _kind(module: nn.RNNBase) -> str:
    return "LSTM" if isinstance(module, nn.LSTM) else "GRU" if isinstance(module, nn.GRU) else "RNN"


def _passed(module: nn.RNNBase, kind: str, x: Tensor, hx: Any) -> Layers:
    directions = 2 if module.bidirectional else 1
    if hx is None:
        batch = x.shape[0] if module.batch_first else x.shape[1]
        zeros = x.new_zeros(directions, batch, module.hidden_size)
        return [(zeros, zeros) if kind == "LSTM" else (zeros,) for _ in range(module.num_layers)]
    return _by_layer(module, tuple(piece.to(x.dtype) for piece in (hx if kind == "LSTM" else (hx,))))


def _by_layer(module: nn.RNNBase, state: tuple[Tensor, ...]) -> Layers:
    directions = 2 if module.bidirectional else 1
    return list(zip(*(piece.split(directions) for piece in state), strict=True))


def _run_ops(module: nn.RNNBase, kind: str, x: Tensor, lens: Tensor, start: Layers) -> tuple[Tensor, Layers]:
    y = x.transpose(0, 1) if module.batch_first else x
    final: Layers = []
    for layer, state in enumerate(start):
        w, r, b = (getattr(module, f"onnx_{name}{layer}") for name in "wrb")
        if kind == "LSTM":
            y, *after = torch.ops.unroll.lstm(y, lens, *state, w, r, b)
        elif kind == "GRU":
            y, *after = torch.ops.unroll.gru(y, lens, *state, w, r, b)
        else:
            y, *after = torch.ops.unroll.rnn(y, lens, *state, w, r, b, str(module.nonlinearity).capitalize())
        final.append(tuple(after))
    return (y.transpose(0, 1) if module.batch_first else y), final


def call_count(path: str) -> ExportError:
    return ExportError(
        "calls_depend_on_time",
        f"layer {path!r} is called a number of times that depends on the sequence's length; call it once on the "
        "whole sequence instead of looping over time steps",
    )
