"""Convolutions, sums, positions and delays, which need earlier time steps. All stream."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from conformance.kinds.kind import Kind, gru, lstm, made


def causal(s: Any, x: Tensor) -> Tensor:
    return s.rnn(s.conv(functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2))[0]


class Causal(nn.Module):
    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.reach, self.conv = kernel - 1, nn.Conv1d(channels, channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x.transpose(1, 2), (self.reach, 0))).transpose(1, 2)


class Cut(nn.Module):
    """Drops the padding that a convolution adds at the end."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : -self.steps]


class Sound(nn.Module):
    """Maps one piece of sound per step to another, as enhancers and codecs do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(1, 4, 8, 4), nn.Conv1d(4, 4, 4, 2)
        self.rnn = gru(4, 4)
        self.third, self.last = nn.ConvTranspose1d(4, 4, 4, 2), nn.ConvTranspose1d(4, 1, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        sound = x.flatten(1)
        outer = self.first(functional.pad(sound.unsqueeze(1), (12, 0))).relu()
        y = self.rnn(self.second(outer).transpose(1, 2))[0].transpose(1, 2)
        y = self.last((self.third(y) + outer).relu())
        return y[..., : sound.shape[1]].reshape(x.shape)


def over_bands(s: Any, x: Tensor) -> Tensor:
    """Convolutions over time and bands, and back, as enhancers of spectra do."""
    batch, time, _ = x.shape
    y = s.down(functional.pad(x.unsqueeze(1), (0, 0, 1, 0))).relu()
    z = s.rnn(y.transpose(1, 2).flatten(2))[0].reshape(batch, time, 2, -1).transpose(1, 2)
    return s.up(z + y)[:, 0, :-1]


def cumulative_norm(s: Any, x: Tensor) -> Tensor:
    """Normalises by the mean and variance of all steps so far."""
    count = torch.ones_like(x[..., :1]).cumsum(1)
    mean = torch.cumsum(x.mean(2, keepdim=True), dim=1) / count
    square = torch.cumsum(x.square().mean(2, keepdim=True), dim=1) / count
    return s.rnn((x - mean) / (square - mean.square() + 1e-3).sqrt())[0]


def cumulative_norm_by_position(s: Any, x: Tensor) -> Tensor:
    """The same, counting values instead of steps, as audio models do."""
    y = x.transpose(1, 2)
    count = torch.arange(4, 4 * (y.shape[2] + 1), 4, dtype=x.dtype).view(1, 1, -1)
    mean = y.sum(1, keepdim=True).cumsum(-1) / count
    square = y.square().sum(1, keepdim=True).cumsum(-1) / count
    return s.rnn(((y - mean) / (square - mean.square() + 1e-3).sqrt()).transpose(1, 2))[0]


HISTORIES = [
    Kind(
        "causal convolutions alone",
        lambda: nn.Sequential(Causal(4, 3), nn.ReLU(), Causal(4, 2)),
        lambda: {"input": torch.randn(2, 7, 4)},
        bit_exact=False,
    ),
    Kind("causal convolution", lambda: made(causal, conv=nn.Conv1d(4, 4, 3), rnn=gru()), bit_exact=False),
    Kind(
        "convolutions that are cut to the length",
        lambda: made(
            lambda s, x: s.rnn(s.convolutions(x.transpose(1, 2)).transpose(1, 2))[0],
            convolutions=nn.Sequential(
                nn.Conv1d(4, 6, 3, padding=2), Cut(2), nn.ReLU(), nn.Conv1d(6, 4, 3, padding=4, dilation=2), Cut(4)
            ),
            rnn=gru(),
        ),
        bit_exact=False,
    ),
    Kind(
        "convolutions that are cut at the end",
        lambda: made(
            lambda s, x: s.rnn(s.two(s.one(x.transpose(1, 2)).relu())[..., :-4].transpose(1, 2))[0],
            one=nn.Conv1d(4, 4, 3, padding=2),
            two=nn.Conv1d(4, 4, 3, padding=2),
            rnn=gru(),
        ),
        bit_exact=False,
    ),
    Kind("pieces of a sound", Sound, lambda: {"x": torch.randn(2, 7, 8)}, bit_exact=False),
    Kind(
        "convolutions over time and bands, and back",
        lambda: made(
            over_bands,
            down=nn.Conv2d(1, 2, (2, 3), (1, 2)),
            rnn=gru(8, 8),
            up=nn.ConvTranspose2d(2, 1, (2, 3), (1, 2)),
        ),
        lambda: {"x": torch.randn(2, 7, 9)},
        bit_exact=False,
    ),
    Kind("cumulative norm", lambda: made(cumulative_norm, rnn=gru())),
    Kind(
        "causal convolution in a module of its own",
        lambda: nn.Sequential(Causal(4, 3), Causal(4, 2), made(lambda s, x: s.rnn(x)[0], rnn=gru())),
        lambda: {"input": torch.randn(2, 7, 4)},
        bit_exact=False,
    ),
    Kind("cumulative norm by position", lambda: made(cumulative_norm_by_position, rnn=gru())),
    Kind(
        "position in the sequence",
        lambda: made(lambda s, x: s.rnn(x + (torch.arange(x.shape[1]).float() * 0.1).sin()[:, None])[0], rnn=gru()),
        bit_exact=False,
    ),
    Kind(
        "position among convolutions and norms",
        lambda: made(
            lambda s, x: s.rnn(s.norm(s.conv(x) + torch.sin(torch.arange(x.shape[1])[:, None] * s.speeds)))[0],
            speeds=nn.Buffer(torch.rand(4)),
            conv=Causal(4, 3),
            norm=nn.LayerNorm(4),
            rnn=lstm(),
        ),
        bit_exact=False,
    ),
]


DELAYS = [
    Kind("delay", lambda: made(lambda s, x: s.rnn(functional.pad(x, (0, 0, 3, 0))[:, : x.shape[1]])[0], rnn=gru())),
    Kind(
        "difference from the step before",
        lambda: made(lambda s, x: s.rnn(x - torch.cat([x[:, :1], x[:, :-1]], 1))[0], rnn=gru()),
    ),
    Kind(
        "torch.diff", lambda: made(lambda s, x: s.rnn(x.diff(dim=1, prepend=torch.zeros_like(x[:, :1])))[0], rnn=gru())
    ),
    Kind(
        "the token before",
        lambda: made(
            lambda s, x: s.rnn(s.embed(x) + s.embed(torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)))[0],
            embed=nn.Embedding(9, 4),
            rnn=lstm(),
        ),
        lambda: {"x": torch.randint(0, 9, (2, 7))},
    ),
    Kind(
        "causal convolution over a repeated first step",
        lambda: made(
            lambda s, x: s.rnn(s.conv(functional.pad(x.transpose(1, 2), (2, 0), mode="replicate")).transpose(1, 2))[0],
            conv=nn.Conv1d(4, 4, 3),
            rnn=gru(),
        ),
        bit_exact=False,
    ),
]
