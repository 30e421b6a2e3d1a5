"""Coding habits in forward that do not change its meaning: each streams like the plain variant."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from conformance.kinds.kind import Kind, gru, head, made


def squeezed(s: Any, x: Tensor) -> Tensor:
    return s.head(s.rnn(x)[0]).squeeze()


def resized(s: Any, x: Tensor) -> Tensor:
    """The buffer is as wide as the batch of the last call."""
    if s.h.shape[1] != x.shape[0]:
        s.h = x.new_zeros(1, x.shape[0], 6)
    return s.rnn(x, s.h)[0]


def with_buffer() -> nn.Module:
    module = made(resized, rnn=gru())
    module.register_buffer("h", torch.zeros(1, 1, 6))
    return module


def fitted(s: Any, x: Tensor) -> Tensor:
    """The zeros are as wide as the batch of the last call."""
    if s.zeros is None or s.batch != x.shape[0]:
        s.batch, s.zeros = x.shape[0], torch.zeros(1, x.shape[0], 6)
    return s.rnn(x, s.zeros)[0]


def by_function(s: Any, x: Tensor) -> Tensor:
    zeros = x.new_zeros(1, x.shape[0], 6)
    return torch.gru(x, zeros, [s.w * s.mask, s.r, s.b, s.b], True, 1, 0.0, s.training, False, True)[0]


def unflattened(s: Any, x: Tensor) -> Tensor:
    return nn.Unflatten(0, x.shape[:2])(s.head(s.rnn(x)[0].flatten(0, 1)))


class OutputOnly(nn.RNNBase):
    """Calls PyTorch's function, and returns more than PyTorch's layer."""

    def __init__(self) -> None:
        super().__init__("LSTM", 4, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(1, x.shape[0], self.hidden_size)
        weights: Any = self._flat_weights
        y, *_ = torch._VF.lstm(x, (zeros, zeros), weights, True, 1, 0.0, self.training, False, True)
        return y


class OwnLSTM(nn.RNNBase):
    """A copy of PyTorch's code, as found in packages."""

    def __init__(self) -> None:
        super().__init__("LSTM", 4, 6, batch_first=True)

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        zeros = x.new_zeros(1, x.shape[0], self.hidden_size)
        weights: Any = self._flat_weights
        y, h, c = torch._VF.lstm(x, hx or (zeros, zeros), weights, True, 1, 0.0, self.training, False, True)
        return y, (h, c)


class OwnCell(nn.RNNBase):
    """A custom cell with the parameters of a PyTorch cell."""

    weight_ih_l0: nn.Parameter
    weight_hh_l0: nn.Parameter
    bias_ih_l0: nn.Parameter

    def __init__(self) -> None:
        super().__init__("RNN_TANH", 4, 6, batch_first=True)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, outs = x.new_zeros(x.shape[0], 6), []
        for step in x.unbind(1):
            given = functional.linear(step, self.weight_ih_l0, self.bias_ih_l0)
            h = torch.tanh(self.norm(given + functional.linear(h, self.weight_hh_l0)))
            outs.append(h)
        return torch.stack(outs, 1), h


class Silent(nn.Module):
    """Its `_apply` does not return the module, so that `.to()` returns None."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = gru()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Cell(nn.Module):
    """A constant, and casts without effect, in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.r, self.scale = nn.Linear(4, 6), nn.Linear(6, 6), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        h, outs = x.new_zeros(x.shape[0], 6) if state is None else state, []
        for t in range(x.shape[1]):
            h = torch.tanh(self.w(x[:, t].to(torch.float32)) + self.r(h) * self.scale.float() * torch.tensor(0.5))
            outs.append(h)
        return torch.stack(outs, 1)


def reset_where_needed(s: Any, x: Tensor, done: Tensor) -> Tensor:
    assert torch.isfinite(x).all()
    h, outs = x.new_zeros(x.shape[0], 6), []
    for t in range(x.shape[1]):
        if done[:, t].any():
            h = h * (1 - done[:, t]).unsqueeze(1)
        h = s.cell(x[:, t], h)
        outs.append(h)
    return torch.stack(outs, 1)


def causal(s: Any, x: Tensor) -> Tensor:
    return s.cell(s.conv(functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2))


def steps(s: Any, x: Tensor) -> Tensor:
    """A causal convolution, a layer and two loops in one forward; one of the loops prints occasionally."""
    x = s.rnn(s.conv(functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2))[0]
    for cell in s.cells:
        h, outs = x.new_zeros(x.shape[0], 6), []
        for t in range(x.shape[1]):
            h = cell(x[:, t], h)
            outs.append(h)
            if (t + 1) % 10_000 == 0:
                print("step", t, h.mean().item())
        x = torch.stack(outs, 1)
    return s.head(x)


def frames(s: Any, x: Tensor) -> Tensor:
    """Time and batch folded, features flattened, and unfolded."""
    return s.rnn(s.flatten(s.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]))[0]


class Stack(nn.Module):
    """Changes the list of its states in place."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.norm = nn.ModuleList([nn.GRUCell(4, 6), nn.GRUCell(6, 6)]), nn.LayerNorm(6)

    def forward(self, x: Tensor, states: list[Tensor]) -> Tensor:
        outs = []
        for y in x.unbind(1):
            for number, cell in enumerate(self.cells):
                y = states[number] = self.norm(cell(y, states[number]))
            outs.append(y)
        return torch.stack(outs, 1)


class Overwritten(nn.Module):
    """Copies each state over the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        h, outs = x.new_zeros(x.shape[0], 6), []
        for step in x.unbind(1):
            h.copy_(self.cell(step, h))
            outs.append(h.clone())
        return torch.stack(outs, 1)


def zeros(s: Any, x: Tensor) -> Tensor:
    return s.stack(x, [x.new_zeros(x.shape[0], 6), x.new_zeros(x.shape[0], 6)])


class Given(nn.Module):
    """Modifies its arguments in place: the sequence, and the list of states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([gru(), gru(6)])

    def forward(self, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x.mul_(0.5)
        for number, layer in enumerate(self.layers):
            x, states[number] = layer(x, states[number])
        return x, states


HABITS = [
    Kind("an output squeezed", lambda: made(squeezed, rnn=gru(), head=nn.Linear(6, 1))),
    Kind("a buffer that forward resizes", with_buffer),
    Kind("an attribute fitted to the batch", lambda: made(fitted, rnn=gru(), zeros=None, batch=0)),
    Kind("an LSTM on PyTorch's base class", lambda: made(lambda s, x: s.head(s.rnn(x)[0]), rnn=OwnLSTM(), head=head())),
    Kind("a cell on PyTorch's base class", lambda: made(lambda s, x: s.rnn(x)[0], rnn=OwnCell())),
    Kind("an LSTM as a function, on PyTorch's base class", OutputOnly),
    Kind(
        "a GRU as a function, with a mask on its weights",
        lambda: made(
            by_function,
            w=nn.Parameter(torch.randn(18, 4)),
            r=nn.Parameter(torch.randn(18, 6) / 3),
            b=nn.Parameter(torch.randn(18)),
            mask=nn.Buffer((torch.rand(18, 4) > 0.5).float()),
        ),
    ),
    Kind("unflattened to batch and time", lambda: made(unflattened, rnn=gru(), head=head())),
    Kind("a module that does not return itself", Silent),
    Kind(
        "a branch that saves work",
        lambda: made(reset_where_needed, cell=nn.GRUCell(4, 6)),
        lambda: {"x": torch.randn(2, 7, 4), "done": (torch.rand(2, 7) < 0.3).float()},
    ),
    Kind("a looping layer without a state", lambda: made(lambda s, x: s.cell(x, None), cell=Cell())),
    Kind(
        "a causal convolution, then a loop", lambda: made(causal, conv=nn.Conv1d(4, 4, 3), cell=Cell()), bit_exact=False
    ),
    Kind(
        "a convolution, a layer and two loops in one forward",
        lambda: made(
            steps,
            conv=nn.Conv1d(4, 4, 3),
            rnn=gru(),
            cells=nn.ModuleList([nn.GRUCell(6, 6), nn.RNNCell(6, 6)]),
            head=head(),
        ),
        bit_exact=False,
    ),
    Kind(
        "frames flattened, batch and time folded",
        lambda: made(frames, conv=nn.Conv2d(1, 2, 3), flatten=nn.Flatten(), rnn=gru(8)),
        lambda: {"x": torch.randn(2, 7, 1, 4, 4)},
    ),
    Kind("a list of states changed in place", lambda: made(zeros, stack=Stack())),
    Kind("a state overwritten in place", Overwritten),
    Kind(
        "arguments changed in place",
        Given,
        lambda: {"x": torch.randn(2, 7, 4), "states": [torch.zeros(1, 2, 6), torch.zeros(1, 2, 6)]},
    ),
]
