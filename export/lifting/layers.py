"""nn.LSTM, nn.GRU and nn.RNN, lifted: they read their state from the tape and write it back.

The user's code sees the same layer: only the class of a copy is replaced, by a subclass with another `forward`.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unroll.export.lifting import packed, recurrent_ops
from unroll.export.lifting.tape import Call, Part, Tape
from unroll.export.signature.outputs import leaves

#: The state of one call: for each layer, h (and c for an LSTM), each (directions, batch, hidden).
Layers = list[tuple[Tensor, ...]]

Native = Callable[..., tuple[Tensor, Any]]


class _Lifted(nn.RNNBase):
    def __setattr__(self, name: str, value: Any) -> None:
        """Ignore weights that forward assigns in a trace, as when it drops some: the graph has those of eval."""
        is_weight = name in vars(self).get("_parameters", ()) and not isinstance(value, nn.Parameter)
        if not (is_weight and torch.compiler.is_exporting()):
            super().__setattr__(name, value)

    def forward(self, input: Any, hx: Any = None) -> Any:
        return _play(self, super().forward, input, hx)


_LIFTED: dict[type[nn.RNNBase], type[nn.RNNBase]] = {
    kind: type(f"Lifted{kind.__name__}", (_Lifted, kind), {}) for kind in (nn.LSTM, nn.GRU, nn.RNN)
}

#: PyTorch's layers that have an ONNX operator.
LAYERS = tuple(_LIFTED)


def recognise_layers(model: nn.Module) -> None:
    """Turn modules that derive from nn.RNNBase and compute the same as a PyTorch layer into that layer.

    Other subclasses, such as a custom cell in a loop over time, stay unchanged.
    """
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and not isinstance(module, LAYERS):
            base = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(module.mode, nn.RNN)
            same = type(type(module).__name__, (base, type(module)), {})
            layer = copy.copy(module)
            layer.__class__ = same
            layer.nonlinearity = module.mode.removeprefix("RNN_").lower()
            if _alike(module, layer):
                module.__class__, module.nonlinearity = same, layer.nonlinearity


def _alike(module: nn.RNNBase, layer: nn.RNNBase) -> bool:
    """Do both give the same answers in their own precision?"""
    dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
    x = torch.randn(5, 7, module.input_size, generator=torch.Generator().manual_seed(17)).to(dtype)
    try:
        with torch.no_grad():
            pairs = list(zip(leaves(module(x)), leaves(layer(x)), strict=True))
    except Exception:  # noqa: BLE001 user code: it may take other arguments
        return False
    return all(a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5) for (_, a), (_, b) in pairs)


def lift_layers(model: nn.Module, tape: Tape) -> None:
    """Lift every recurrent layer of `model` in place."""
    for path, module in model.named_modules():
        if isinstance(module, LAYERS):
            # Our class comes after the module's own in the MRO: a subclass of nn.LSTM keeps its forward, and
            # reaches ours through super().
            lifted = next(lifted for base, lifted in _LIFTED.items() if isinstance(module, base))
            bases = (lifted,) if type(module) in _LIFTED else (type(module), lifted)
            module.__class__ = type(type(module).__name__, bases, {})
            module.unroll_tape = tape
            module.unroll_rows = 1
            module.unroll_path = path.removesuffix("unroll_layer").removesuffix(".") or type(module).__name__


def split_time_steps(model: nn.Module, tape: Tape, run: Callable[[tuple[int, int]], Any]) -> None:
    """Recognise layers that run within a time step, such as over the bands of a spectrum, or on several rows per input.

    Sets `unroll_rows` to the number of layer sequences per input sequence, or to 0 for a layer that runs within each
    time step and so carries no state to the next. A later check finds whether an input's sequences are adjacent in the
    layer's batch: otherwise rows are mixed.

    Args:
        run: calls forward with a batch size and a length.
    """
    seen: dict[str, list[list[tuple[int, int]]]] = {}
    sizes = ((2, 3), (3, 3), (2, 5))
    for number, size in enumerate(sizes):
        tape.start(None, None)
        run(size)
        for call in tape.calls:
            seen.setdefault(call.module, [[], [], []])[number].append((call.batch, call.time))
    tape.start(None, None)
    found = {path: _rows(calls, sizes) for path, calls in seen.items()}
    if any(rows != 0 for rows in found.values()):
        for module in model.modules():
            if isinstance(module, LAYERS):
                module.unroll_rows = found.get(str(module.unroll_path), 1)


def _rows(calls: list[list[tuple[int, int]]], sizes: tuple[tuple[int, int], ...]) -> int:
    """The value of `unroll_rows`, from each call's (batch, time) at each size; 1 for layers that fit neither case."""
    if len({len(each) for each in calls}) > 1:
        return 1
    pairs = [(seen, size) for each, size in zip(calls, sizes, strict=True) for seen in each]
    if len({time for (_, time), _ in pairs}) == 1 and len({b / (batch * t) for (b, _), (batch, t) in pairs}) == 1:
        return 0
    ratios = {b / batch for (b, _), (batch, _) in pairs}
    ratio = ratios.pop()
    return int(ratio) if not ratios and ratio.is_integer() and all(time == t for (_, time), (_, t) in pairs) else 1


def take_weights(model: nn.Module, source: nn.Module) -> None:
    """Store the weights of `source`, a model of the same structure, in `model`, in ONNX's layout.

    Call this after a forward, which computes normalised weights.
    """
    for module, original in zip(model.modules(), source.modules(), strict=True):
        if isinstance(module, LAYERS) and isinstance(original, LAYERS):
            dtype = next(module.parameters()).dtype
            for layer in range(module.num_layers):
                for name, weight in recurrent_ops.layer_weights(original, _kind(module), layer).items():
                    module.register_buffer(f"onnx_{name}{layer}", weight.to(dtype), persistent=False)


def _play(module: nn.RNNBase, native: Native, x: Any, hx: Any) -> Any:
    """The forward of a lifted layer, with the same arguments and results as the original's."""
    if isinstance(x, PackedSequence):
        # `data` is the padded tensor, batch first: see `packed`.
        sequence = x.data if module.batch_first else x.data.transpose(0, 1)
        out, hidden = _play(module, native, sequence, hx)
        return packed.like(x, out if module.batch_first else out.transpose(0, 1)), hidden
    if x.dim() == 2:
        # One sequence without a batch axis.
        module.unroll_tape.unbatched = True  # type: ignore[union-attr]
        axis = 0 if module.batch_first else 1
        batched = _map(hx, lambda state: state.unsqueeze(1))
        out, hidden = _play(module, native, x.unsqueeze(axis), batched)
        return out.squeeze(axis), _map(hidden, lambda state: state.squeeze(1))
    return _play_batch(module, native, x, hx)


def _play_batch(module: nn.RNNBase, native: Native, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
    tape: Tape = module.unroll_tape  # type: ignore[assignment]
    path, kind, rows = str(module.unroll_path), _kind(module), int(module.unroll_rows)  # type: ignore[arg-type]
    batch, time = (x.shape[0], x.shape[1]) if module.batch_first else (x.shape[1], x.shape[0])
    lens = tape.lens
    if rows == 0:
        lens = None if lens is None else torch.full((batch,), time, dtype=torch.int32)
        out, _, returned = _run(module, native, x, _layers(module, kind, _asked(module, kind, x, hx, batch)), lens)
        return out, returned if kind == "LSTM" else returned[0]
    index, start = tape.begin(path, lambda: _joined_rows(_asked(module, kind, x, hx, batch), rows))
    if lens is not None and rows > 1:
        lens = lens.repeat_interleave(rows)
    out, final, returned = _run(module, native, x, _layers(module, kind, _split_rows(start, rows)), lens)
    parts = tuple(
        Part(which, layer, direction)  # type: ignore[arg-type]
        for layer in range(module.num_layers)
        for which in (("h", "c") if kind == "LSTM" else ("h",))
        for direction in ("forward", "reverse")[: 1 + module.bidirectional]
    )
    asked = hx if isinstance(hx, tuple) else () if hx is None else (hx,)
    left = _joined_rows(_pieces(final), rows)
    tape.calls.append(Call(path, index, parts, batch // rows, time, start, left, asked, returned))
    return out, returned if kind == "LSTM" else returned[0]


def _run(
    module: nn.RNNBase, native: Native, x: Tensor, start: Layers, lens: Tensor | None
) -> tuple[Tensor, Layers, tuple[Tensor, ...]]:
    """Run the layer: PyTorch's own without `lens`, otherwise the graph's operators.

    Returns:
        The output, the final states by layer, and the final states as PyTorch returns them.
    """
    kind = _kind(module)
    if lens is None and not module.proj_size:
        joined = tuple(torch.cat(pieces) for pieces in zip(*start, strict=True))
        out, hidden = native(x, joined if kind == "LSTM" else joined[0])
        returned = hidden if kind == "LSTM" else (hidden,)
        return out, _by_layer(module, returned), returned
    if lens is None:
        batch, time = (x.shape[0], x.shape[1]) if module.batch_first else (x.shape[1], x.shape[0])
        lens = torch.full((batch,), time, dtype=torch.int32)
    out, final = _run_ops(module, kind, x, lens, start)
    shown = [_projected(module, layer, state) for layer, state in enumerate(final)]
    return out, final, tuple(torch.cat(pieces) for pieces in zip(*shown, strict=True))


def _joined_rows(pieces: list[Tensor], rows: int) -> list[Tensor]:
    """(batch * rows, size) -> (batch, rows * size), the layout of the state row."""
    return pieces if rows == 1 else [piece.reshape(-1, rows * piece.shape[1]) for piece in pieces]


def _split_rows(pieces: list[Tensor], rows: int) -> list[Tensor]:
    """The inverse of `_joined_rows`."""
    return pieces if rows == 1 else [piece.reshape(-1, piece.shape[1] // rows) for piece in pieces]


def _run_ops(module: nn.RNNBase, kind: str, x: Tensor, lens: Tensor, start: Layers) -> tuple[Tensor, Layers]:
    y = x.transpose(0, 1) if module.batch_first else x
    final: Layers = []
    for layer, state in enumerate(start):
        w, r, b = (getattr(module, f"onnx_{name}{layer}") for name in "wrb")
        if kind == "LSTM":
            y, *after = torch.ops.unroll.lstm(y, lens, *state, w, r, b)
            if module.proj_size:
                y = _project(module, layer, y)
        elif kind == "GRU":
            y, *after = torch.ops.unroll.gru(y, lens, *state, w, r, b)
        else:
            y, *after = torch.ops.unroll.rnn(y, lens, *state, w, r, b, str(module.nonlinearity).capitalize())
        final.append(tuple(after))
    return (y.transpose(0, 1) if module.batch_first else y), final


def _project(module: nn.RNNBase, layer: int, y: Tensor) -> Tensor:
    """(time, batch, directions * hidden) -> (time, batch, directions * proj_size)."""
    p = getattr(module, f"onnx_p{layer}")
    halves = y.split(module.hidden_size, dim=2)
    return torch.cat([half @ p[direction].T for direction, half in enumerate(halves)], 2)


def _projected(module: nn.RNNBase, layer: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The state as PyTorch returns it. With proj_size, the row holds h before its projection."""
    if not module.proj_size:
        return state
    h, c = state
    return h @ getattr(module, f"onnx_p{layer}").transpose(1, 2), c


def _asked(module: nn.RNNBase, kind: str, x: Tensor, hx: Any, batch: int) -> list[Tensor]:
    directions = 1 + module.bidirectional
    if hx is None:
        zeros = x.new_zeros(directions, batch, module.hidden_size)
        return _pieces([(zeros, zeros) if kind == "LSTM" else (zeros,)] * module.num_layers)
    layers = _by_layer(module, tuple(piece.to(x.dtype) for piece in (hx if kind == "LSTM" else (hx,))))
    if module.proj_size:
        # Every h is the projection of some vector, because proj_size is smaller than hidden_size.
        inverse = [getattr(module, f"onnx_i{layer}") for layer in range(module.num_layers)]
        layers = [(h @ back.to(h.dtype).transpose(1, 2), c) for (h, c), back in zip(layers, inverse, strict=True)]
    return _pieces(layers)


def _layers(module: nn.RNNBase, kind: str, pieces: list[Tensor]) -> Layers:
    left = iter(pieces)
    return [
        tuple(_join([next(left) for _ in range(1 + module.bidirectional)]) for _ in range(2 if kind == "LSTM" else 1))
        for _ in range(module.num_layers)
    ]


def _pieces(layers: Layers) -> list[Tensor]:
    return [direction.squeeze(0) for layer in layers for piece in layer for direction in piece.split(1)]


def _join(directions: list[Tensor]) -> Tensor:
    return directions[0].unsqueeze(0) if len(directions) == 1 else torch.stack(directions)


def _by_layer(module: nn.RNNBase, state: tuple[Tensor, ...]) -> Layers:
    return list(zip(*(piece.split(1 + module.bidirectional) for piece in state), strict=True))


def _kind(module: nn.RNNBase) -> str:
    return "LSTM" if isinstance(module, nn.LSTM) else "GRU" if isinstance(module, nn.GRU) else "RNN"


def _map(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if state is None:
        return None
    return tuple(map(change, state)) if isinstance(state, tuple) else change(state)
