"""Further kinds of modules found in streaming models; their outcomes are measured, not expected."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from conformance.kinds.kind import Kind, Parts, gru, head, lstm, made, rnn


class Step(Parts):
    """A Python loop over time around `step(x, states) -> states`; the first state is the output."""

    def __init__(self, hidden: int, states: int = 1, **parts: Any) -> None:
        super().__init__(**parts)
        self.hidden, self.states = hidden, states

    step: Callable[..., tuple[Tensor, ...]]

    def forward(self, x: Tensor) -> Tensor:
        states = tuple(x.new_zeros(x.shape[0], self.hidden) for _ in range(self.states))
        outs = []
        for t in range(x.shape[1]):
            states = self.step(x[:, t], *states)
            outs.append(states[0])
        return torch.stack(outs, 1)


class IndRNN(Step):
    """Each unit sees only itself."""

    wx: nn.Linear
    u: nn.Parameter

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor]:
        return (torch.relu(self.wx(x) + self.u * h),)


class SRU(Step):
    """A simple recurrent unit: only an elementwise recurrence depends on the previous step."""

    wx: nn.Linear

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        candidate, f, r = self.wx(x).chunk(3, 1)
        c = f.sigmoid() * c + (1 - f.sigmoid()) * candidate
        return r.sigmoid() * c.tanh() + (1 - r.sigmoid()) * candidate, c


class Nested(Step):
    """Two cells per step, the second on the first one's state, as in hand-written stacked LSTMs."""

    low: nn.LSTMCell
    high: nn.GRUCell

    def step(self, x: Tensor, h: Tensor, c: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, c = self.low(x, (h, c))
        return self.high(h, g), c, h


class ExponentialMean(Step):
    def step(self, x: Tensor, mean: Tensor) -> tuple[Tensor]:
        return (0.9 * mean + 0.1 * x,)


class Steps(NamedTuple):
    mean: Tensor
    deviation: Tensor


@dataclass
class Detection:
    score: Tensor
    embedding: Tensor


def images(s: Any, x: Tensor) -> Tensor:
    """Frames through a CNN with batch and time folded together, then over time."""
    batch, time = x.shape[:2]
    seen = s.cnn(x.flatten(0, 1)).flatten(1)
    return s.rnn(seen.unflatten(0, (batch, time)))[0]


def mixture(s: Any, x: Tensor) -> dict[str, Tensor]:
    """A mixture density head, as for handwriting synthesis."""
    weight, mean, deviation = s.head(s.rnn(x)[0]).chunk(3, -1)
    return {"weight": weight.softmax(-1), "mean": mean, "deviation": deviation.exp()}


def autoencoder(s: Any, x: Tensor) -> Tensor:
    """Encodes the whole sequence to one vector, and decodes it."""
    _, (h, _) = s.encoder(x)
    return s.head(s.decoder(h[-1:].transpose(0, 1).expand(-1, x.shape[1], -1))[0])


def decayed(s: Any, x: Tensor, delta: Tensor) -> Tensor:
    """Values decay with the time since they were measured."""
    return s.rnn(torch.cat([x * torch.exp(-torch.relu(s.rate(delta))), delta], -1))[0]


def conditioned(s: Any, x: Tensor, series: Tensor) -> Tensor:
    """An embedding of the series, the same for every step."""
    return s.rnn(torch.cat([x, s.embed(series)[:, None].expand(-1, x.shape[1], -1)], -1))[0]


def tied(s: Any, token: Tensor) -> Tensor:
    return s.rnn(s.embed(token))[0] @ s.embed.weight.T


def dilated(s: Any, x: Tensor) -> Tensor:
    y = x.transpose(1, 2)
    for index, conv in enumerate(s.convs):
        y = y + torch.relu(conv(functional.pad(y, (2 * 2**index, 0))))
    return s.rnn(y.transpose(1, 2))[0]


def residual_stack(s: Any, x: Tensor) -> Tensor:
    for layer, norm in zip(s.layers, s.norms, strict=True):
        x = norm(x + layer(x)[0])
    return x


def two_speeds(s: Any, x: Tensor) -> Tensor:
    """The slow layer sees every second step, repeated."""
    slow = s.slow(x[:, ::2])[0].repeat_interleave(2, 1)[:, : x.shape[1]]
    return s.fast(torch.cat([x, slow], -1))[0]


def windowed(s: Any, x: Tensor) -> Tensor:
    """Attention over the last four steps."""
    y = s.rnn(x)[0]
    past = functional.pad(y, (0, 0, 3, 0)).unfold(1, 4, 1).transpose(2, 3)
    return ((past @ y[..., None]).softmax(2) * past).sum(2)


def running_peak(s: Any, x: Tensor) -> Tensor:
    return s.rnn(x / x.abs().cummax(1).values.clamp(min=1e-3))[0]


APPLICATIONS = [
    Kind(
        "residual stack with norms",
        lambda: made(
            residual_stack,
            layers=nn.ModuleList(lstm(4, 4) for _ in range(4)),
            norms=nn.ModuleList(nn.LayerNorm(4) for _ in range(4)),
        ),
    ),
    Kind(
        "dense, gated, recurrent, dense",
        lambda: made(
            lambda s, x: s.out(s.rnn(functional.glu(s.into(x)))[0]).relu(),
            into=nn.Linear(4, 12),
            rnn=gru(6, 6),
            out=nn.Linear(6, 2),
        ),
    ),
    Kind(
        "LSTM, GRU and RNN in one stack",
        lambda: made(lambda s, x: s.c(s.b(s.a(x)[0])[0])[0], a=lstm(4, 5), b=gru(5, 6), c=rnn(6, 3)),
    ),
    Kind(
        "forward layer over a bidirectional one",
        lambda: made(lambda s, x: s.top(s.both(x)[0])[0], both=lstm(bidirectional=True), top=gru(12, 3)),
    ),
    Kind(
        "embedding tied to the head",
        lambda: made(tied, embed=nn.Embedding(11, 6), rnn=lstm(6, 6)),
        lambda: {"token": torch.randint(0, 11, (2, 7))},
    ),
    Kind(
        "frames through a CNN, then an LSTM",
        lambda: made(images, cnn=nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2)), rnn=lstm(27, 5)),
        lambda: {"x": torch.randn(2, 7, 1, 8, 8)},
    ),
    Kind(
        "mixture density head",
        lambda: made(mixture, rnn=lstm(3, 8, 2), head=nn.Linear(8, 12)),
        lambda: {"x": torch.randn(2, 7, 3)},
    ),
    Kind("autoencoder", lambda: made(autoencoder, encoder=lstm(), decoder=lstm(6, 6), head=nn.Linear(6, 4))),
    Kind(
        "decay by time since measured",
        lambda: made(decayed, rate=nn.Linear(4, 4), rnn=gru(8, 6)),
        lambda: {"x": torch.randn(2, 7, 4), "delta": torch.rand(2, 7, 4)},
    ),
    Kind(
        "conditioned on the series",
        lambda: made(conditioned, embed=nn.Embedding(9, 3), rnn=lstm(7, 6)),
        lambda: {"x": torch.randn(2, 7, 4), "series": torch.randint(0, 9, (2,))},
        {"static": ["series"]},
    ),
    Kind(
        "dilated causal convolutions, then a GRU",
        lambda: made(dilated, convs=nn.ModuleList(nn.Conv1d(4, 4, 3, dilation=2**i) for i in range(3)), rnn=gru()),
    ),
    Kind(
        "a named tuple",
        lambda: made(
            lambda s, x: Steps(s.head(s.rnn(x)[0]), functional.softplus(s.head(s.rnn(x)[0]))), rnn=gru(), head=head()
        ),
    ),
    Kind("a dataclass", lambda: made(lambda s, x: Detection(s.rnn(x)[0][..., 0].sigmoid(), x), rnn=gru())),
    Kind(
        "one number a step",
        lambda: made(lambda s, x: s.head(s.rnn(x)[0]).squeeze(-1), rnn=lstm(), head=nn.Linear(6, 1)),
    ),
    Kind("all states of all layers", lambda: made(lambda s, x: torch.cat(list(s.rnn(x)[1]), -1), rnn=gru(layers=3))),
    Kind("running peak", lambda: made(running_peak, rnn=gru())),
    Kind("attention over a window", lambda: made(windowed, rnn=gru())),
    Kind("two speeds", lambda: made(two_speeds, slow=gru(), fast=gru(10, 6))),
    Kind("IndRNN in a loop", lambda: IndRNN(6, wx=nn.Linear(4, 6), u=nn.Parameter(torch.rand(6)))),
    Kind("SRU in a loop", lambda: SRU(6, 2, wx=nn.Linear(4, 18))),
    Kind("two cells a step", lambda: Nested(6, 3, low=nn.LSTMCell(4, 6), high=nn.GRUCell(6, 6))),
    Kind("exponential mean in a loop", lambda: ExponentialMean(4)),
    Kind(
        "exponential mean, then a GRU",
        lambda: nn.Sequential(ExponentialMean(4), made(lambda s, x: s.rnn(x)[0], rnn=gru())),
        lambda: {"input": torch.randn(2, 7, 4)},
    ),
    Kind("compiled", lambda: cast(nn.Module, torch.compile(made(lambda s, x: s.rnn(x)[0], rnn=gru())))),
    Kind("hidden size 1", lambda: made(lambda s, x: s.rnn(x)[0], rnn=lstm(4, 1))),
    Kind(
        "clipped and rounded inputs", lambda: made(lambda s, x: s.rnn((x.clamp(-1, 1) * 8).round() / 8)[0], rnn=gru())
    ),
]
