"""One recurrent layer as a custom op: what ONNX's LSTM, GRU and RNN operators compute, in plain PyTorch.

All tensors are laid out as ONNX wants them, so that the translation to a node is one line each:
x (time, batch, features); lens (batch,) int32; h, c (directions, batch, hidden); w (directions, gates * hidden,
features), r (directions, gates * hidden, hidden), b (directions, 2 * gates * hidden), gates in ONNX's order.
y (time, batch, directions * hidden) is zero beyond a row's length, and its state stays what it was there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Tensor, Tensor], State]

#: ONNX's gate order as indices into torch's: LSTM i,f,g,o -> i,o,f,g; GRU r,z,n -> z,r,n.
GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def layer_weights(module: nn.RNNBase, kind: str, layer: int) -> dict[str, Tensor]:
    """w, r, b of one layer of a torch module, in ONNX's layout and gate order and in float64; a missing bias is zero.

    Taken from the list that PyTorch computes with: a weight that is normalised may differ from it. With proj_size
    there is also p (directions, proj_size, hidden), and i, its pseudo-inverse; and r is what takes an h that is not
    projected yet: an LSTM of r @ p whose output p projects is the same function, and one that onnxruntime has.
    """
    named = dict(zip(module._flat_weights_names, module._flat_weights, strict=True))
    suffixes = ["", "_reverse"] if module.bidirectional else [""]
    order = GATE_ORDER[kind]

    def in_order(name: str) -> Tensor:
        weight = named.get(name)
        if weight is None:
            return torch.zeros(len(order) * module.hidden_size, dtype=torch.float64)
        gates = weight.detach().double().chunk(len(order))
        return torch.cat([gates[index] for index in order])

    names = {"w": ["weight_ih"], "r": ["weight_hh"], "b": ["bias_ih", "bias_hh"]}
    found = {
        short: torch.stack([torch.cat([in_order(f"{name}_l{layer}{end}") for name in long]) for end in suffixes])
        for short, long in names.items()
    }
    if module.proj_size:
        found["p"] = torch.stack(
            [weight.double() for end in suffixes if (weight := named[f"weight_hr_l{layer}{end}"]) is not None]
        )
        found["i"] = torch.linalg.pinv(found["p"])
        found["r"] = found["r"] @ found["p"]
    return found


@torch.library.custom_op("unroll::lstm", mutates_args=())
def lstm(
    x: Tensor, lens: Tensor, h: Tensor, c: Tensor, w: Tensor, r: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    def step(wx: Tensor, state: State, r: Tensor, rb: Tensor) -> State:
        i, o, f, g = (wx + state[0] @ r.T + rb).chunk(4, 1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    y, (h, c) = _run(step, x, lens, (h, c), w, r, b)
    return y, h, c


@torch.library.custom_op("unroll::gru", mutates_args=())
def gru(x: Tensor, lens: Tensor, h: Tensor, w: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    def step(wx: Tensor, state: State, r: Tensor, rb: Tensor) -> State:
        xz, xr, xn = wx.chunk(3, 1)
        hz, hr, hn = (state[0] @ r.T + rb).chunk(3, 1)
        z = (xz + hz).sigmoid()
        n = (xn + (xr + hr).sigmoid() * hn).tanh()
        return ((1 - z) * n + z * state[0],)

    y, (h,) = _run(step, x, lens, (h,), w, r, b)
    return y, h


@torch.library.custom_op("unroll::rnn", mutates_args=())
def rnn(x: Tensor, lens: Tensor, h: Tensor, w: Tensor, r: Tensor, b: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    activate = {"Tanh": torch.tanh, "Relu": torch.relu}[activation]
    y, (h,) = _run(lambda wx, s, r, rb: (activate(wx + s[0] @ r.T + rb),), x, lens, (h,), w, r, b)
    return y, h


def _run(
    step: Step, x: Tensor, lens: Tensor, state: State, w: Tensor, r: Tensor, b: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    outputs, finals = [], []
    for direction in range(len(w)):
        input_bias, state_bias = b[direction].chunk(2)
        wx = x @ w[direction].T + input_bias
        now = tuple(piece[direction] for piece in state)
        out = x.new_zeros(len(x), x.shape[1], r.shape[2])
        for t in range(len(x)) if direction == 0 else reversed(range(len(x))):
            alive = (lens > t).unsqueeze(1)
            new = step(wx[t], now, r[direction], state_bias)
            now = tuple(torch.where(alive, a, b) for a, b in zip(new, now, strict=True))
            out[t] = torch.where(alive, now[0], 0.0)
        outputs.append(out)
        finals.append(now)
    return torch.cat(outputs, 2), tuple(torch.stack(pieces) for pieces in zip(*finals, strict=True))


def _vmap(operator: Any, rows: tuple[int | None, ...]) -> None:
    """Sequences that come one by one, each a batch of one, are run together. rows: each argument's batch axis."""

    def run(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        def together(value: Any, dim: int | None, axis: int | None) -> Any:
            if axis is None:
                return value
            each = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            return each.movedim(0, axis).flatten(axis, axis + 1)

        results = operator(*map(together, arguments, in_dims, rows))
        return tuple(result.unflatten(1, (info.batch_size, -1)) for result in results), (1,) * len(results)

    torch.library.register_vmap(operator, run)


@torch.library.custom_op("unroll::cat", mutates_args=())
def cat(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """torch.cat, whose own rule for sequences that come one by one fixes their number."""
    return torch.cat(list(tensors), axis)


@cat.register_fake
def _(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return torch.cat(list(tensors), axis)


def _cat_rows(info: Any, in_dims: Any, tensors: Sequence[Tensor], axis: int) -> tuple[Tensor, int]:
    rows = [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims[0], strict=True)
    ]
    return torch.cat(rows, axis if axis < 0 else axis + 1), 0


torch.library.register_vmap(cat, _cat_rows)


#: PyTorch's functions that treat the rows of a batch alike, with the dimensions of one row; 0 if they may be any.
_BY_ROWS = {
    functional.layer_norm: 0,
    functional.batch_norm: 0,
    functional.group_norm: 0,
    functional.instance_norm: 0,
    torch.conv1d: 2,
    torch.conv2d: 3,
}

#: What `by_rows` calls: the function and its arguments, with `Tensor` for each tensor. A few per model that is traced.
_CALLS: dict[str, tuple[Any, list[Any], Any]] = {}


@torch.library.custom_op("unroll::by_rows", mutates_args=())
def by_rows(tensors: Sequence[Tensor], call: str) -> Tensor:
    """One of `_BY_ROWS`, whose own rule for sequences that come one by one fixes their number.

    Only for these: when the trace is lowered, what runs is the function itself.
    """
    return _called(tensors, call)


@by_rows.register_fake
def _(tensors: Sequence[Tensor], call: str) -> Tensor:
    return _called(tensors, call)


def _called(tensors: Sequence[Tensor], call: str) -> Tensor:
    function, leaves, structure = _CALLS[call]
    left = iter(tensors)
    args, kwargs = pytree.tree_unflatten([next(left) if leaf is Tensor else leaf for leaf in leaves], structure)
    return function(*args, **kwargs)


def _by_rows_rule(info: Any, in_dims: Any, tensors: Sequence[Tensor], call: str) -> tuple[Tensor, int]:
    (x, *weights), (dim, *others) = tensors, in_dims[0]
    if dim is None or any(other is not None for other in others):
        raise NotImplementedError(f"{_CALLS[call][0].__name__} with weights of a sequence's own")
    rows = x.movedim(dim, 0)
    if rows.dim() - 1 == _BY_ROWS[_CALLS[call][0]]:
        return _called([rows, *weights], call), 0
    return _called([rows.flatten(0, 1), *weights], call).unflatten(0, (info.batch_size, -1)), 0


torch.library.register_vmap(by_rows, _by_rows_rule)


#: Casts: PyTorch checks the tensor's size at each, which it cannot do for sequences that come one by one.
_CASTS = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.long: torch.int64,
    Tensor.int: torch.int32,
    Tensor.bool: torch.bool,
}


def _cast_to(func: Any, args: Any, kwargs: Any) -> torch.dtype | None:
    """What the call casts its first argument to, if it is a cast and nothing else."""
    if func in _CASTS:
        return _CASTS[func]
    if func in {Tensor.to, Tensor.type, Tensor.type_as}:
        given = [*args[1:], *kwargs.values()]
        if len(given) == 1 and isinstance(given[0], (torch.dtype, Tensor)):
            return given[0].dtype if isinstance(given[0], Tensor) else given[0]
    return None


class OneByOne(TorchFunctionMode):
    """Within, calls may be traced for sequences that come one by one, where PyTorch's own rules fix their number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in {torch.cat, torch.concat, torch.stack} and args:
            tensors, axis = args[0], kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
            if func is torch.stack:
                tensors = [tensor.unsqueeze(axis) for tensor in tensors]
            return torch.ops.unroll.cat(list(tensors), axis)
        if dtype := _cast_to(func, args, kwargs):
            return args[0] if args[0].dtype == dtype else torch.ops.aten._to_copy.default(args[0], dtype=dtype)
        if func in _BY_ROWS and args:
            leaves, structure = pytree.tree_flatten((args, kwargs))
            given = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            call = f"{func.__name__} {given} {structure}"
            _CALLS[call] = func, given, structure
            return torch.ops.unroll.by_rows([leaf for leaf in leaves if isinstance(leaf, Tensor)], call)
        return func(*args, **kwargs)


_vmap(lstm, (1, 0, 1, 1, None, None, None))
_vmap(gru, (1, 0, 1, None, None, None))
_vmap(rnn, (1, 0, 1, None, None, None, None))


def _y_like(x: Tensor, h: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], h.shape[0] * h.shape[2])


@lstm.register_fake
def _(x: Tensor, lens: Tensor, h: Tensor, c: Tensor, w: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _y_like(x, h), torch.empty_like(h), torch.empty_like(c)


@gru.register_fake
def _(x: Tensor, lens: Tensor, h: Tensor, w: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return _y_like(x, h), torch.empty_like(h)


@rnn.register_fake
def _(x: Tensor, lens: Tensor, h: Tensor, w: Tensor, r: Tensor, b: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return _y_like(x, h), torch.empty_like(h)
