"""Custom ops that compute what ONNX's LSTM, GRU and RNN operators compute, in plain PyTorch.

All tensors have ONNX's layout, so that `onnx/translation.py` can pass them to a node unchanged:
x (time, batch, features); lens (batch,) int32; h, c (directions, batch, hidden); w (directions, gates * hidden,
features), r (directions, gates * hidden, hidden), b (directions, 2 * gates * hidden), gates in ONNX's order.
y (time, batch, directions * hidden) is zero beyond a row's length, and the row's state does not change there.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Tensor, Tensor], State]

#: ONNX's gate order as indices into torch's: LSTM i,f,g,o -> i,o,f,g; GRU r,z,n -> z,r,n.
GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def layer_weights(module: nn.RNNBase, kind: str, layer: int) -> dict[str, Tensor]:
    """The weights w, r, b of one layer, in ONNX's layout and gate order and in float64; a missing bias is zero.

    They come from `_flat_weights`, with which PyTorch computes; a normalised parameter may differ from it. With
    proj_size there are also p (directions, proj_size, hidden) and i, its pseudo-inverse. Then r is r @ p, which takes h
    before the projection: an LSTM with r @ p followed by the projection p is the same function, and onnxruntime
    supports it.
    """
    named = dict(zip(module._flat_weights_names, module._flat_weights, strict=True))
    suffixes = ["", "_reverse"] if module.bidirectional else [""]
    order = GATE_ORDER[kind]

    def gates(name: str) -> list[Tensor]:
        weight = named.get(name)
        if weight is None:
            return [torch.zeros(len(order) * module.hidden_size)]
        found = weight.detach().chunk(len(order))
        return [found[index] for index in order]

    names = {"w": ["weight_ih"], "r": ["weight_hh"], "b": ["bias_ih", "bias_hh"]}
    found = {
        short: torch.cat([gate for end in suffixes for name in long for gate in gates(f"{name}_l{layer}{end}")])
        .double()
        .unflatten(0, (len(suffixes), -1))
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
