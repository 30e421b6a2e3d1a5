"""Modules modelled on those of public packages, for export's tests; docs/packages.md has the originals."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from conformance.kinds.kind import Kind, gru, head, lstm, made


class _Neuron(NamedTuple):
    decay: Tensor
    threshold: Tensor


class Spiking(nn.Module):
    """A leaky integrate-and-fire neuron with its constants in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.p = nn.Linear(4, 6), _Neuron(torch.as_tensor(100.0), torch.as_tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        state, outs = None, []
        for step in x.unbind(1):
            current = self.fc(step)
            v = torch.zeros_like(current) if state is None else state
            v = v + 0.001 * self.p.decay * (current - v)
            outs.append(v)
            state = (1 - (v > self.p.threshold).to(v.dtype)) * v
        return torch.stack(outs, 1)


class Potential(nn.Module):
    """A neuron with its potential as an argument, and also as a buffer created in the first call."""

    mem: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mem", torch.zeros(0), persistent=False)

    def reset(self) -> Tensor:
        self.mem = torch.zeros_like(self.mem)
        return self.mem

    def forward(self, x: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
        self.mem = mem
        if self.mem.shape != x.shape:
            self.mem = torch.zeros_like(x)
        self.mem = 0.9 * self.mem + x - (self.mem > 1.0).to(x.dtype)
        return (self.mem > 1.0).to(x.dtype), self.mem


def potentials(s: Any, x: Tensor) -> Tensor:
    mem, outs = s.neuron.reset(), []
    for step in x.unbind(1):
        spikes, mem = s.neuron(s.fc(step), mem)
        outs.append(s.head(spikes) + mem[:, :3])
    return torch.stack(outs, 1)


def two_paths(s: Any, x: Tensor) -> Tensor:
    """Runs in both directions over the bands of each time step, then over time for each band, as denoisers do."""
    batch, time, bands = x.shape
    y = s.down(s.within(x.reshape(batch * time, bands, 1))[0])
    y = y.reshape(batch, time, bands, 1).transpose(1, 2).reshape(batch * bands, time, 1)
    return s.out(s.over(y)[0]).reshape(batch, bands, time).transpose(1, 2)


class Dropped(nn.Module):
    """Sets a layer's weight in every call, and keeps its state in a list, as AWD-LSTM does."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.batch = lstm(), 1
        self.raw = nn.Parameter(self.rnn.get_parameter("weight_hh_l0").data)
        del self.rnn.weight_hh_l0
        self.rnn.flatten_parameters = self.do_nothing  # type: ignore[method-assign]
        self.reset()

    def do_nothing(self) -> None: ...

    def reset(self) -> None:
        self.hidden = [(torch.zeros(1, self.batch, 6), torch.zeros(1, self.batch, 6))]
        self.rnn.weight_hh_l0 = self.raw.clone()

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.weight_hh_l0 = functional.dropout(self.raw.clone(), 0.5, self.training)
        if x.shape[0] != self.batch:
            self.batch = x.shape[0]
            self.reset()
        y, state = self.rnn(x, self.hidden[0])
        self.hidden = [state]
        return y


class Detector(nn.Module):
    """Keeps the end of each chunk of sound for the next one, and starts empty, as a voice detector does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn = nn.Conv1d(1, 4, 24, stride=8), lstm(4)
        self.state, self.context = None, torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, samples = x.shape
        context = self.context if self.context.numel() else x.new_zeros(batch, 8)
        sound = torch.cat([context, x.reshape(batch, -1)], 1)
        self.context = sound[:, -8:]
        windows = sound.unfold(1, 8 + samples, samples).reshape(batch * time, 1, -1)
        y, self.state = self.rnn(self.conv(windows).reshape(batch, time, 4), self.state)
        return y


def smoothed(s: Any, x: Tensor) -> Tensor:
    """An exponential mean that starts with the first value."""
    outs = [x[:, 0]]
    for t in range(1, x.shape[1]):
        outs.append(0.9 * outs[-1] + 0.1 * x[:, t])
    return s.head(torch.stack(outs, 1))


def numbered(s: Any, x: Tensor) -> Tensor:
    """A mean with bias correction for its zero start."""
    mean, outs = x.new_zeros(x.shape[0], 4), []
    for t in range(x.shape[1]):
        mean = 0.9 * mean + 0.1 * x[:, t]
        outs.append(mean / (1 - 0.9 ** (t + 1)))
    return s.head(torch.stack(outs, 1))


def turning(s: Any, x: Tensor) -> Tensor:
    """A state that rotates in the complex plane."""
    turn, h, outs = torch.polar(s.radius, s.angle), torch.zeros(x.shape[0], 4, dtype=torch.complex64), []
    for step in x.unbind(1):
        h = turn * h + step
        outs.append(h.real)
    return torch.stack(outs, 1)


def largest(s: Any, x: Tensor) -> Tensor:
    """A running maximum that starts at -inf."""
    m, outs = x.new_full((x.shape[0], 4), -float("inf")), []
    for step in x.unbind(1):
        m = torch.maximum(m * s.decay, step)
        outs.append(m)
    return torch.stack(outs, 1)


SHIPPED = [
    Kind("constants in a named tuple", Spiking),
    Kind(
        "neurons with a buffer that begins empty",
        lambda: made(potentials, fc=nn.Linear(4, 6), neuron=Potential(), head=head()),
    ),
    Kind(
        "layers over the bands and over time",
        lambda: made(
            two_paths, within=gru(1, 3, bidirectional=True), down=nn.Linear(6, 1), over=gru(1, 5), out=nn.Linear(5, 1)
        ),
        bit_exact=False,
    ),
    Kind(
        "a delay by padding what was cut",
        lambda: made(lambda s, x: s.rnn(x - functional.pad(x[:, :-1], (0, 0, 1, 0)))[0], rnn=gru()),
    ),
    Kind("a weight that every call sets, states in a list", Dropped),
    Kind(
        "the end of a chunk of sound, kept for the next",
        Detector,
        lambda: {"x": torch.randn(2, 7, 16)},
        ragged=False,
        bit_exact=False,
    ),
    Kind(
        "time last",
        lambda: made(
            lambda s, x: s.rnn(s.conv(functional.pad(x, (2, 0))).transpose(1, 2))[0].transpose(1, 2),
            conv=nn.Conv1d(4, 4, 3),
            rnn=gru(),
        ),
        lambda: {"x": torch.randn(2, 4, 7)},
        options={"time_last": True},
        bit_exact=False,
    ),
    Kind(
        "a layer whose rows of one sequence are apart",
        lambda: made(lambda s, x: s.rnn(torch.cat([x, -x]))[0].unflatten(0, (2, x.shape[0])).sum(0), rnn=gru()),
        refused="rows_mixed",
    ),
    Kind(
        "a loop from the second step",
        lambda: made(smoothed, head=head(4)),
        refused="calls_depend_on_time",
        says="first time step out of its loop",
    ),
    Kind(
        "another number in each step",
        lambda: made(numbered, head=head(4)),
        refused="calls_depend_on_time",
        says="count in a tensor",
    ),
    Kind("a complex state", lambda: made(turning, radius=nn.Buffer(torch.rand(4)), angle=nn.Buffer(torch.rand(4)))),
    Kind(
        "a state that begins at infinity",
        lambda: made(largest, decay=nn.Buffer(torch.rand(4))),
        refused="initial_state",
        says="-1e30",
    ),
    Kind(
        "NaN for missing values",
        lambda: made(lambda s, x: s.rnn(torch.nan_to_num(x))[0], rnn=gru()),
        lambda: {"x": torch.tensor([[[1.0, torch.nan, 2.0, 3.0]] * 7] * 2)},
        refused="not_finite",
        says="isnan",
    ),
    Kind(
        "float64 asked for in forward",
        lambda: made(lambda s, x: s.rnn(x.double())[0], rnn=gru()).double(),
        refused="forward_failed",
        says="the parameters are torch.float64",
    ),
    Kind(
        "an operator that ONNX lacks",
        lambda: made(lambda s, x: s.rnn(torch.digamma(x))[0], rnn=gru()),
        refused="not_exportable",
        says="torch.digamma",
    ),
]
