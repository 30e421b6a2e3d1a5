"""Modules of many shapes as users write them, each with what export must make of it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Forward = Callable[..., Any]


class Parts(nn.Module):
    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def made(forward: Forward, **parts: Any) -> nn.Module:
    """A module of the given parts, with `forward(self, ...)` as its own."""
    return type("Made", (Parts,), {"forward": forward})(**parts)


@dataclass(frozen=True)
class Shape:
    name: str
    build: Callable[[], nn.Module]
    #: Example inputs; floats of (2, 7, 4) unless said.
    example: Callable[[], dict[str, Any]] = lambda: {"x": torch.randn(2, 7, 4)}
    options: dict[str, Any] = field(default_factory=dict)
    #: The code it is refused with, or None.
    refused: str | None = None
    #: What the refusal or the reason for not streaming must say.
    says: str = ""
    streams: bool = True
    ragged: bool = True
    bit_exact: bool = True
    outputs: tuple[str, ...] = ("y",)


def lstm(inputs: int = 4, hidden: int = 6, layers: int = 1, **options: Any) -> nn.LSTM:
    return nn.LSTM(inputs, hidden, layers, batch_first=True, **options)


def gru(inputs: int = 4, hidden: int = 6, layers: int = 1, **options: Any) -> nn.GRU:
    return nn.GRU(inputs, hidden, layers, batch_first=True, **options)


def rnn(inputs: int = 4, hidden: int = 6, layers: int = 1, **options: Any) -> nn.RNN:
    return nn.RNN(inputs, hidden, layers, batch_first=True, **options)


def per_step(s: Any, x: Tensor) -> Tensor:
    return s.head(s.rnn(x)[0])


def head(inputs: int = 6) -> nn.Linear:
    return nn.Linear(inputs, 3)


class Residual(nn.Module):
    """Embedding, LSTM, LayerNorm with a residual, GRU, head: several recurrent layers with others between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = lstm(6, 6, 2, dropout=0.5)
        self.norm = nn.LayerNorm(6)
        self.second = gru(6, 5)
        self.head = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.first(x)[0])
        return self.head(self.second(x)[0])


class Stateful(nn.Module):
    """Keeps h in the module between calls, the way many scripts do."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = gru()
        self.h: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, self.h = self.rnn(x, self.h)
        return y


class Custom(nn.GRU):
    """A user's own subclass of a recurrent layer."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Any:
        out, h = super().forward(input * 2, hx)
        return out + 1, h


def running_mean(s: Any, x: Tensor) -> Tensor:
    s.mean = 0.9 * s.mean + 0.1 * x.mean(1, keepdim=True)
    return s.rnn(x - s.mean)[0]


def normed(layer: nn.LSTM) -> nn.Module:
    """As training leaves it: the norm is estimated better with each call."""
    normed = nn.utils.spectral_norm(layer, "weight_hh_l0", n_power_iterations=20).train()
    with torch.no_grad():
        normed(torch.zeros(1, 1, layer.input_size))
    return normed


def flattened(s: Any, x: Tensor) -> Tensor:
    s.rnn.flatten_parameters()
    return s.rnn(x)[0]


def remembers(s: Any, x: Tensor) -> Tensor:
    """Writes an attribute that no later call reads."""
    s.seen = s.rnn(x)[0]
    return s.seen


def zeros_passed(s: Any, x: Tensor) -> Tensor:
    h0 = torch.zeros(2, x.size(0), 6)
    out, _ = s.rnn(x, (h0, h0.clone()))
    return s.head(out)


def learned(s: Any, x: Tensor) -> Tensor:
    return s.rnn(x, s.h0.expand(-1, x.shape[0], -1).contiguous())[0]


def from_input(s: Any, x: Tensor) -> Tensor:
    return s.rnn(x, s.start(x[:, 0]).unsqueeze(0))[0]


def from_static(s: Any, x: Tensor, known: Tensor) -> Tensor:
    h, c = s.start(known).tanh().unflatten(1, (2, 2, 6)).permute(1, 2, 0, 3).contiguous()
    return s.rnn(x, (h, c))[0]


def loop_from_static(s: Any, x: Tensor, known: Tensor) -> Tensor:
    h, outs = s.start(known), []
    for t in range(x.shape[1]):
        h = torch.tanh(s.wx(x[:, t]) + s.u * h)
        outs.append(h)
    return torch.stack(outs, 1)


def loop_over_own(s: Any, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.shape[1]):
        s.h = s.cell(x[:, t], s.h)
        outs.append(s.h)
    return torch.stack(outs, 1)


def with_cache(s: Any, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """A causal convolution as streaming models have it."""
    joined = torch.cat([cache, x], 1)
    return s.rnn(s.conv(joined.transpose(1, 2)).transpose(1, 2))[0], joined[:, -3:]


def decayed(s: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    y, h = s.rnn(x, h)
    return y, h * 0.9


def half_cached(s: Any, x: Tensor) -> Tensor:
    """The next call has the convolution's past, and none of the layer's."""
    cache = x.new_zeros(x.shape[0], 3, 4) if s.cache is None else s.cache
    y, s.cache = with_cache(s, x, cache)
    return y


def cached(s: Any, x: Tensor) -> Tensor:
    joined = torch.cat([x.new_zeros(x.shape[0], 2, 4) if s.cache is None else s.cache, x], 1)
    s.cache = joined[:, -2:]
    y, s.h = s.rnn(s.conv(joined.transpose(1, 2)).transpose(1, 2), s.h)
    return y


def over_window(s: Any, x: Tensor, past: dict[str, Tensor]) -> dict[str, Any]:
    """Attention over the last nine steps, and how many there were, up to eight."""
    keys = torch.cat([past["keys"], x], 1)
    count = past["count"][:, None] + torch.arange(x.shape[1])
    window = keys.unfold(1, 9, 1).transpose(2, 3)
    found = ((window @ x[..., None]).softmax(2) * window).sum(2) + s.count(count.clamp(max=8))
    return {"y": s.head(found), "past": {"keys": keys[:, -8:], "count": count[:, -1] + 1}}


def changed_in_place(s: Any, x: Tensor) -> Tensor:
    y, h = s.rnn(x, s.h)
    s.h.copy_(h)
    return y


def by_length(s: Any, x: Tensor) -> Tensor:
    return s.rnn(x, torch.full((1, x.shape[0], 6), float(x.shape[1])))[0]


def loop(s: Any, x: Tensor) -> Tensor:
    h = torch.zeros(1, x.shape[0], 6)
    outs = []
    for t in range(x.shape[1]):
        out, h = s.rnn(x[:, t : t + 1], h)
        outs.append(out)
    return torch.cat(outs, 1)


def causal(s: Any, x: Tensor) -> Tensor:
    return s.rnn(s.conv(functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2))[0]


class Causal(nn.Module):
    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.reach, self.conv = kernel - 1, nn.Conv1d(channels, channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x.transpose(1, 2), (self.reach, 0))).transpose(1, 2)


class Cut(nn.Module):
    """Drops what a convolution adds at the end."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : -self.steps]


def cumulative_norm(s: Any, x: Tensor) -> Tensor:
    """By the mean and the variance of everything so far."""
    count = torch.ones_like(x[..., :1]).cumsum(1)
    mean = torch.cumsum(x.mean(2, keepdim=True), dim=1) / count
    square = torch.cumsum(x.square().mean(2, keepdim=True), dim=1) / count
    return s.rnn((x - mean) / (square - mean.square() + 1e-3).sqrt())[0]


def cumulative_norm_by_position(s: Any, x: Tensor) -> Tensor:
    """The same, counting as audio models do: by the number of values so far."""
    y = x.transpose(1, 2)
    count = torch.arange(4, 4 * (y.shape[2] + 1), 4, dtype=x.dtype).view(1, 1, -1)
    mean = y.sum(1, keepdim=True).cumsum(-1) / count
    square = y.square().sum(1, keepdim=True).cumsum(-1) / count
    return s.rnn(((y - mean) / (square - mean.square() + 1e-3).sqrt()).transpose(1, 2))[0]


def pointwise_conv(s: Any, x: Tensor) -> Tensor:
    return s.rnn(s.conv(x.transpose(1, 2)).transpose(1, 2))[0]


def attention(s: Any, x: Tensor) -> Tensor:
    y = s.rnn(x)[0]
    return torch.softmax(y @ y.transpose(1, 2), -1) @ y


def causal_attention(s: Any, x: Tensor) -> Tensor:
    y = s.rnn(x)[0]
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return torch.softmax((y @ y.transpose(1, 2)).masked_fill(~mask, -1e9), -1) @ y


def ahead(s: Any, x: Tensor) -> Tensor:
    return s.rnn(torch.cat([x[:, 1:], x[:, -1:]], 1))[0]


def packed(s: Any, x: Tensor) -> Tensor:
    lengths = torch.full((x.shape[0],), x.shape[1])
    return pad_packed_sequence(s.rnn(pack_padded_sequence(x, lengths, batch_first=True))[0], batch_first=True)[0]


def packed_with(s: Any, x: Tensor, lengths: Tensor) -> Any:
    p = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    out, sizes = pad_packed_sequence(s.rnn(p)[0], batch_first=True)
    return s.head(out), out[torch.arange(out.shape[0]), sizes - 1]


def packed_by_values(s: Any, x: Tensor) -> Tensor:
    lengths = (x[..., 0] > 0).sum(1).clamp(min=1)
    p = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(s.rnn(p)[0], batch_first=True, total_length=x.shape[1])[0]


def cells(s: Any, x: Tensor) -> Tensor:
    first = second = None
    outs = []
    for step in x.unbind(1):
        first = s.first(step, first)
        second = s.second(first[0], second)
        outs.append(s.head(second))
    return torch.stack(outs, 1)


def minimal(s: Any, x: Tensor) -> Tensor:
    """A minimal gated unit, with everything in one forward."""
    h = torch.zeros(x.shape[0], 6)
    for t in range(x.shape[1]):
        step = s.embed(x[:, t])
        f = torch.sigmoid(s.f(torch.cat([step, h], 1)))
        h = (1 - f) * h + f * torch.tanh(s.g(torch.cat([step, f * h], 1)))
    return h * 2


def growing(s: Any, x: Tensor) -> Tensor:
    h, seen = torch.zeros(x.shape[0], 6), []
    for t in range(x.shape[1]):
        h = s.cell(x[:, t], torch.stack([h, *seen]).mean(0))
        seen.append(h)
    return torch.stack(seen, 1)


class Layer(nn.Module):
    """A cell with layer norm in a loop, time first."""

    def __init__(self, inputs: int, hidden: int, after: nn.Module | None = None) -> None:
        super().__init__()
        self.w, self.r = nn.Linear(inputs, 4 * hidden, bias=False), nn.Linear(hidden, 4 * hidden)
        self.norm, self.after = nn.LayerNorm(4 * hidden), after or nn.Identity()

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        i, f, g, o = (self.norm(self.w(x)) + self.r(state[0])).chunk(4, 1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def steps(self, x: Tensor) -> list[Tensor]:
        return list(x.unbind(0))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if state is None:
            zeros = x.new_zeros(x.shape[1], self.r.in_features)
            state = (zeros, zeros)
        outs = []
        for step in self.steps(x):
            state = self.step(step, state)
            outs.append(self.after(state[0]))
        return torch.stack(self.steps(torch.stack(outs))), state


class Backwards(Layer):
    def steps(self, x: Tensor) -> list[Tensor]:
        return list(x.unbind(0))[::-1]


def stack_of_layers(s: Any, x: Tensor) -> Tensor:
    zeros = torch.zeros(x.shape[0], 6)
    y, _ = s.b(s.a(x.transpose(0, 1), (zeros, zeros))[0])
    return y.transpose(0, 1)


def encoder_decoder(s: Any, x: Tensor) -> Tensor:
    _, h = s.encoder(x)
    return s.decoder(x, h)[0]


def two_results(s: Any, x: Tensor) -> dict[str, Tensor]:
    y, (h, _) = s.rnn(x)
    return {"steps": s.head(y), "last": s.head(h[-1]), "choice": s.head(y).argmax(-1)}


def state_dropped(s: Any, x: Tensor, hc: Any = None) -> Any:
    y, hc = s.rnn(x, hc)
    return s.head(y), hc


def half(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module.to(dtype)


def quantized() -> nn.Module:
    module = made(per_step, rnn=lstm(), head=head())
    # Only the place of its class counts.
    module.rnn.__class__ = type("LSTM", (nn.LSTM,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.rnn"})
    return module


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still found in the wild
        return made(per_step, rnn=torch.jit.script(gru()), head=head())


def trained() -> nn.Module:
    module = Stateful()
    module(torch.randn(1, 3, 4))
    return module


def pair(one: int, two: int) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 5, one), "u": torch.randn(2, 5, two)}


SHAPES = [
    # Exported, and streams.
    Shape("lstm", lambda: made(per_step, rnn=lstm(layers=2), head=head())),
    Shape("gru", lambda: made(per_step, rnn=gru(layers=3), head=head())),
    Shape("rnn tanh", lambda: made(per_step, rnn=rnn(layers=4), head=head())),
    Shape("rnn relu", lambda: made(per_step, rnn=rnn(layers=2, nonlinearity="relu"), head=head())),
    Shape("no bias", lambda: made(per_step, rnn=lstm(layers=2, bias=False), head=head())),
    Shape("dropout, in training mode", lambda: made(per_step, rnn=gru(layers=2, dropout=0.5), head=head()).train()),
    Shape("embedding, LSTM, norm, GRU", Residual, lambda: {"tokens": torch.randint(0, 11, (2, 9))}),
    Shape("a bare nn.LSTM", lambda: lstm(layers=2), lambda: {"input": torch.randn(1, 5, 4)}),
    Shape(
        "time first throughout",
        lambda: made(per_step, rnn=nn.GRU(4, 6, 2), head=head()),
        lambda: {"x": torch.randn(7, 2, 4)},
        {"batch_first": False},
    ),
    Shape(
        "time first inside",
        lambda: made(lambda s, x: s.rnn(x.transpose(0, 1))[0].transpose(0, 1), rnn=nn.LSTM(4, 6)),
    ),
    Shape("time first outside", lambda: made(lambda s, x: s.rnn(x)[0].permute(1, 2, 0), rnn=gru())),
    Shape(
        "last step by out", lambda: made(lambda s, x: s.head(s.rnn(x)[0][:, -1]), rnn=gru(), head=head()), ragged=False
    ),
    Shape("last step by h_n", lambda: made(lambda s, x: s.head(s.rnn(x)[1][-1]), rnn=gru(layers=2), head=head())),
    Shape("h_n alone", lambda: made(lambda s, x: s.rnn(x)[1][0][-1], rnn=lstm())),
    Shape("only the state itself", lambda: made(lambda s, x: s.rnn(x)[1], rnn=gru(layers=2))),
    Shape("zeros passed", lambda: made(zeros_passed, rnn=lstm(layers=2), head=head())),
    Shape("learned initial state", lambda: made(learned, rnn=gru(), h0=nn.Parameter(torch.randn(1, 1, 6)))),
    Shape("state left out", lambda: made(state_dropped, rnn=lstm(layers=2), head=head())),
    Shape(
        "state given",
        lambda: made(state_dropped, rnn=lstm(layers=2), head=head()),
        lambda: {"x": torch.randn(2, 5, 4), "hc": (torch.full((2, 2, 6), 0.5), torch.full((2, 2, 6), -0.25))},
    ),
    Shape(
        "one module called twice",
        lambda: made(lambda s, x: s.rnn(s.rnn(x)[0])[0], rnn=gru(6, 6)),
        lambda: {"x": torch.randn(2, 5, 6)},
    ),
    Shape(
        "two inputs",
        lambda: made(lambda s, x, u: s.a(x)[0] + s.b(u)[0], a=gru(4, 6), b=lstm(3, 6)),
        lambda: pair(4, 3),
    ),
    Shape(
        "several outputs in a dict",
        lambda: made(two_results, rnn=lstm(), head=head()),
        outputs=("steps", "last", "choice"),
    ),
    Shape("tuple of outputs", lambda: made(lambda s, x: (s.rnn(x)[0], x * 2), rnn=gru()), outputs=("y0", "y1")),
    Shape(
        "named outputs",
        lambda: made(lambda s, x: (s.rnn(x)[0], x * 2), rnn=gru()),
        options={"output_names": ["a", "b"]},
        outputs=("a", "b"),
    ),
    Shape("a subclass of nn.GRU", lambda: Custom(4, 6, batch_first=True), lambda: {"input": torch.randn(2, 5, 4)}),
    Shape(
        "matrices as steps",
        lambda: made(lambda s, x: s.rnn(x.flatten(2))[0], rnn=gru(6, 5)),
        lambda: {"x": torch.randn(2, 5, 2, 3)},
    ),
    Shape(
        "batch norm",
        lambda: made(
            lambda s, x: s.rnn(s.norm(x.transpose(1, 2)).transpose(1, 2))[0], norm=nn.BatchNorm1d(4), rnn=gru()
        ),
    ),
    Shape("1x1 convolution", lambda: made(pointwise_conv, conv=nn.Conv1d(4, 4, 1), rnn=gru()), bit_exact=False),
    Shape(
        "inputs of wild scales",
        lambda: made(per_step, rnn=lstm(), head=head()),
        lambda: {"x": torch.randn(2, 7, 4) * torch.tensor([1e-3, 1.0, 30.0, 0.0])},
    ),
    Shape(
        "one-hot integers",
        lambda: made(lambda s, x: s.rnn(functional.one_hot(x, 4).float())[0], rnn=gru()),
        lambda: {"x": torch.randint(0, 4, (2, 5))},
    ),
    Shape("weight norm", lambda: made(per_step, rnn=parametrizations.weight_norm(gru(), "weight_hh_l0"), head=head())),
    Shape("spectral norm by hook", lambda: made(per_step, rnn=normed(lstm()), head=head())),
    Shape("weights flattened in forward", lambda: made(flattened, rnn=gru())),
    Shape(
        "names the exporter uses itself",
        lambda: made(lambda s, transpose: s.rnn(transpose)[0], rnn=gru()),
        lambda: {"transpose": torch.randn(2, 5, 4)},
    ),
    Shape("an input that is an output", lambda: made(lambda s, x: (s.rnn(x)[0], x), rnn=gru()), outputs=("y0", "y1")),
    Shape(
        "a mask",
        lambda: made(lambda s, x, mask: s.rnn(x)[0] * mask[..., None], rnn=gru()),
        lambda: {"x": torch.randn(2, 5, 4), "mask": torch.rand(2, 5) > 0.5},
    ),
    Shape(
        "an example of zeros, one step",
        lambda: made(per_step, rnn=gru(), head=head()),
        lambda: {"x": torch.zeros(1, 1, 4)},
    ),
    Shape("an attribute written for inspection", lambda: made(remembers, rnn=gru())),
    Shape("proj_size", lambda: made(per_step, rnn=lstm(layers=2, proj_size=3), head=head(3))),
    Shape(
        "proj_size, state given",
        lambda: made(state_dropped, rnn=lstm(proj_size=3, bias=False), head=head(3)),
        lambda: {"x": torch.randn(2, 5, 4), "hc": (torch.full((1, 2, 3), 0.5), torch.full((1, 2, 6), -0.25))},
    ),
    Shape("packed, all of one length", lambda: made(packed, rnn=gru())),
    Shape(
        "packed with lengths, last valid step",
        lambda: made(packed_with, rnn=lstm(layers=2), head=head()),
        lambda: {"x": torch.randn(3, 7, 4), "lengths": torch.tensor([5, 7, 3])},
        outputs=("y0", "y1"),
    ),
    Shape(
        "a packed sequence in and out",
        lambda: gru(layers=2),
        lambda: {"input": pack_padded_sequence(torch.randn(2, 7, 4), torch.tensor([7, 4]), batch_first=True)},
    ),
    Shape(
        "one sequence without a batch",
        lambda: made(per_step, rnn=nn.LSTM(4, 6, 2), head=head()),
        lambda: {"x": torch.randn(7, 4)},
    ),
    Shape("loop over a layer", lambda: made(loop, rnn=gru())),
    Shape("loop over cells", lambda: made(cells, first=nn.LSTMCell(4, 6), second=nn.GRUCell(6, 5), head=head(5))),
    Shape(
        "loop in the open, last step, tokens",
        lambda: made(minimal, embed=nn.Embedding(9, 4), f=nn.Linear(10, 6), g=nn.Linear(10, 6)),
        lambda: {"x": torch.randint(0, 9, (2, 7))},
    ),
    Shape(
        "loops of modules of their own", lambda: made(stack_of_layers, a=Layer(4, 6), b=Layer(6, 6, nn.Dropout(0.5)))
    ),
    Shape("causal convolution", lambda: made(causal, conv=nn.Conv1d(4, 4, 3), rnn=gru()), bit_exact=False),
    Shape(
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
    Shape("cumulative norm", lambda: made(cumulative_norm, rnn=gru())),
    Shape(
        "causal convolution in a module of its own",
        lambda: nn.Sequential(Causal(4, 3), Causal(4, 2), made(lambda s, x: s.rnn(x)[0], rnn=gru())),
        lambda: {"input": torch.randn(2, 7, 4)},
        bit_exact=False,
    ),
    Shape("cumulative norm by position", lambda: made(cumulative_norm_by_position, rnn=gru())),
    Shape(
        "position in the sequence",
        lambda: made(lambda s, x: s.rnn(x + (torch.arange(x.shape[1]).float() * 0.1).sin()[:, None])[0], rnn=gru()),
        bit_exact=False,
    ),
    Shape(
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
    Shape("initial state from the first step", lambda: made(from_input, rnn=gru(), start=nn.Linear(4, 6))),
    Shape(
        "initial state from a static input",
        lambda: made(from_static, rnn=lstm(layers=2), start=nn.Linear(3, 24)),
        lambda: {"x": torch.randn(2, 7, 4), "known": torch.randn(2, 3)},
        {"static": ["known"]},
    ),
    Shape(
        "a loop that starts from a static input",
        lambda: made(loop_from_static, start=nn.Linear(3, 6), wx=nn.Linear(4, 6), u=nn.Parameter(torch.rand(6))),
        lambda: {"x": torch.randn(2, 7, 4), "known": torch.randn(2, 3)},
        {"static": ["known"]},
    ),
    Shape("state in self.h", Stateful),
    Shape(
        "state in a module within", lambda: nn.Sequential(Stateful(), head()), lambda: {"input": torch.randn(2, 7, 4)}
    ),
    Shape(
        "a cache in the module, beside h",
        lambda: made(cached, conv=nn.Conv1d(4, 4, 3), rnn=gru(), cache=None, h=None),
        ragged=False,
        bit_exact=False,
    ),
    Shape(
        "a cache that forward takes and returns",
        lambda: made(with_cache, conv=nn.Conv1d(4, 4, 4), rnn=gru()),
        lambda: {"x": torch.randn(2, 7, 4), "cache": torch.zeros(2, 3, 4)},
        {"state": {"cache": "y1"}},
        ragged=False,
        bit_exact=False,
    ),
    Shape(
        "attention over a window that it takes and returns",
        lambda: made(over_window, count=nn.Embedding(9, 4), head=nn.Linear(4, 3)),
        lambda: {
            "x": torch.randn(2, 7, 4),
            "past": {"keys": torch.zeros(2, 8, 4), "count": torch.zeros(2, dtype=torch.int64)},
        },
        {"state": {"past": "past"}},
        ragged=False,
        bit_exact=False,
    ),
    Shape("a loop over self.h", lambda: made(loop_over_own, cell=nn.GRUCell(4, 6), h=None)),
    Shape("delay", lambda: made(lambda s, x: s.rnn(functional.pad(x, (0, 0, 3, 0))[:, : x.shape[1]])[0], rnn=gru())),
    Shape(
        "difference from the step before",
        lambda: made(lambda s, x: s.rnn(x - torch.cat([x[:, :1], x[:, :-1]], 1))[0], rnn=gru()),
    ),
    Shape(
        "torch.diff", lambda: made(lambda s, x: s.rnn(x.diff(dim=1, prepend=torch.zeros_like(x[:, :1])))[0], rnn=gru())
    ),
    Shape(
        "the token before",
        lambda: made(
            lambda s, x: s.rnn(s.embed(x) + s.embed(torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)))[0],
            embed=nn.Embedding(9, 4),
            rnn=lstm(),
        ),
        lambda: {"x": torch.randint(0, 9, (2, 7))},
    ),
    Shape(
        "causal convolution over a repeated first step",
        lambda: made(
            lambda s, x: s.rnn(s.conv(functional.pad(x.transpose(1, 2), (2, 0), mode="replicate")).transpose(1, 2))[0],
            conv=nn.Conv1d(4, 4, 3),
            rnn=gru(),
        ),
        bit_exact=False,
    ),
    # Exported for whole sequences, with the reason.
    Shape(
        "bidirectional proj_size",
        lambda: made(per_step, rnn=lstm(layers=2, bidirectional=True, proj_size=2), head=head(4)),
        streams=False,
        says="layer 'rnn' is bidirectional",
    ),
    Shape(
        "loop from the end",
        lambda: made(lambda s, x: s.b(s.a(x.transpose(0, 1))[0])[0].transpose(0, 1), a=Layer(4, 6), b=Backwards(6, 6)),
        streams=False,
        says="layer 'b' is bidirectional",
    ),
    Shape(
        "bidirectional LSTM",
        lambda: made(per_step, rnn=lstm(layers=2, bidirectional=True), head=head(12)),
        streams=False,
        says="layer 'rnn' is bidirectional",
    ),
    Shape(
        "bidirectional GRU",
        lambda: made(per_step, rnn=gru(bidirectional=True), head=head(12)),
        streams=False,
        says="layer 'rnn' is bidirectional",
    ),
    Shape(
        "bidirectional RNN",
        lambda: made(per_step, rnn=rnn(bidirectional=True), head=head(12)),
        streams=False,
        says="layer 'rnn' is bidirectional",
    ),
    Shape(
        "mean over time",
        lambda: made(lambda s, x: s.head(s.rnn(x)[0].mean(1)), rnn=gru(), head=head()),
        streams=False,
        ragged=False,
        says="how the sequence is cut",
    ),
    Shape(
        "maximum over time",
        lambda: made(lambda s, x: s.rnn(x)[0].amax(1), rnn=gru()),
        streams=False,
        ragged=False,
        says="after layer 'rnn'",
    ),
    Shape(
        "centred convolution",
        lambda: made(pointwise_conv, conv=nn.Conv1d(4, 4, 3, padding=1), rnn=gru()),
        streams=False,
        ragged=False,
        bit_exact=False,
        says="later time steps (at layer 'conv' (Conv1d))",
    ),
    Shape(
        "centred convolution, far",
        lambda: made(pointwise_conv, conv=nn.Conv1d(4, 4, 3, dilation=16, padding=16), rnn=gru()),
        streams=False,
        ragged=False,
        bit_exact=False,
        says="later time steps (at layer 'conv' (Conv1d))",
    ),
    Shape(
        "attention over time", lambda: made(attention, rnn=gru()), streams=False, ragged=False, says="later time steps"
    ),
    Shape(
        "causal attention",
        lambda: made(causal_attention, rnn=gru()),
        streams=False,
        bit_exact=False,
        says="how the sequence is cut",
    ),
    Shape("look-ahead", lambda: made(ahead, rnn=gru()), streams=False, ragged=False, says="later time steps"),
    Shape(
        "flipped in time",
        lambda: made(lambda s, x: s.rnn(x.flip(1))[0].flip(1), rnn=gru()),
        streams=False,
        ragged=False,
        says="later time steps",
    ),
    Shape(
        "a table of positions, looked up",
        lambda: made(
            lambda s, x: s.rnn(x + s.table(torch.arange(x.shape[1])))[0], table=nn.Embedding(50, 4), rnn=gru()
        ),
        streams=False,
        says="how the sequence is cut",
    ),
    Shape(
        "encoder and decoder",
        lambda: made(encoder_decoder, encoder=gru(), decoder=gru()),
        streams=False,
        says="later time steps (at layer 'decoder'",
    ),
    # Refused.
    Shape(
        "a cell without a loop",
        lambda: made(lambda s, x: s.cell(x[:, 0])[0], cell=nn.LSTMCell(4, 6)),
        refused="no_recurrent_layer",
    ),
    Shape(
        "packed with lengths of its own",
        lambda: made(packed_by_values, rnn=gru()),
        refused="packed_sequence",
        says="as an argument",
    ),
    Shape("no recurrent layer", lambda: made(lambda s, x: s.head(x), head=head(4)), refused="no_recurrent_layer"),
    Shape(
        "a recurrent layer never called",
        lambda: made(lambda s, x: s.head(x), rnn=gru(), head=head(4)),
        refused="no_recurrent_layer",
    ),
    Shape(
        "parameters of two dtypes",
        lambda: made(per_step, rnn=gru(), head=head().half()),
        refused="dtype",
        says="2 dtypes",
    ),
    Shape(
        "float64 input",
        lambda: made(per_step, rnn=gru(), head=head()),
        lambda: {"x": torch.randn(2, 5, 4).double()},
        refused="dtype",
        says="'x'",
    ),
    Shape("scripted, and no class of its own to run", scripted, refused="scripted", says="nn.Module"),
    Shape("kept from training", trained, refused="not_copyable"),
    Shape("quantized", quantized, refused="quantized", says="'rnn'"),
    Shape(
        "one step taken for a sequence",
        lambda: made(lambda s, x: s.rnn(x[:, 0])[0], rnn=gru()),
        refused="unbatched",
        says="2-D",
    ),
    Shape(
        "a state of another shape",
        lambda: made(with_cache, conv=nn.Conv1d(4, 4, 4), rnn=gru()),
        lambda: {"x": torch.randn(2, 7, 4), "cache": torch.zeros(2, 3, 4)},
        {"state": {"cache": "y0"}},
        refused="input",
        says="it returns y0 (2, 7, 6), y1 (2, 3, 4)",
    ),
    Shape(
        "a state that is not the layer's own",
        lambda: made(decayed, rnn=gru()),
        lambda: {"x": torch.randn(2, 7, 4), "h": torch.zeros(1, 2, 6)},
        {"state": {"h": "y1"}},
        refused="input",
        says="'y1' is not the state that this layer ends in",
    ),
    Shape(
        "a state that no client starts from",
        lambda: made(with_cache, conv=nn.Conv1d(4, 4, 4), rnn=gru()),
        lambda: {"x": torch.randn(2, 7, 4), "cache": torch.randn(2, 3, 4)},
        {"state": {"cache": "y1"}},
        refused="input",
        says="in every row",
    ),
    Shape(
        "one of two states kept",
        lambda: made(half_cached, conv=nn.Conv1d(4, 4, 4), rnn=gru(), cache=None),
        refused="keeps_state",
        says="'cache'",
    ),
    Shape(
        "state changed in place",
        lambda: made(changed_in_place, rnn=gru(), h=nn.Buffer(torch.zeros(1, 2, 6))),
        refused="keeps_state",
        says="'h'",
    ),
    Shape(
        "running mean in a buffer",
        lambda: made(running_mean, rnn=gru(), mean=nn.Buffer(torch.zeros(()))),
        refused="keeps_state",
        says="'mean'",
    ),
    Shape(
        "random numbers",
        lambda: made(lambda s, x: s.rnn(x + torch.randn_like(x))[0], rnn=gru()),
        refused="not_deterministic",
    ),
    Shape("initial state from the length", lambda: made(by_length, rnn=gru()), refused="not_exportable", says="length"),
    Shape(
        "rows of a given state differ",
        lambda: made(state_dropped, rnn=gru(), head=head()),
        lambda: {"x": torch.randn(2, 5, 4), "hc": torch.randn(1, 2, 6)},
        refused="initial_state",
        says="'hc'",
    ),
    Shape(
        "a loop that keeps all it has seen",
        lambda: made(growing, cell=nn.GRUCell(4, 6)),
        refused="calls_depend_on_time",
        says="loops over time steps",
    ),
    Shape("mean over the batch", lambda: made(lambda s, x: s.rnn(x - x.mean(0))[0], rnn=gru()), refused="rows_mixed"),
    Shape(
        "batch taken for time",
        lambda: made(per_step, rnn=nn.GRU(4, 6), head=head()),
        refused="layer_axes",
        says="batch_first=False",
    ),
    Shape(
        "every second step",
        lambda: made(lambda s, x: s.rnn(x[:, ::2])[0], rnn=gru()),
        refused="layer_axes",
        says="'rnn'",
    ),
    Shape(
        "a sequence per sensor",
        lambda: made(lambda s, x: s.rnn(x.flatten(0, 1))[0], rnn=gru()),
        lambda: {"x": torch.randn(2, 5, 7, 4)},
        refused="layer_axes",
    ),
    Shape("shorter output", lambda: made(lambda s, x: s.rnn(x)[0][:, 1:], rnn=gru()), refused="output", says="length"),
    Shape("batch and time folded", lambda: made(lambda s, x: s.rnn(x)[0].flatten(0, 1), rnn=gru()), refused="output"),
    Shape(
        "a number as output", lambda: made(lambda s, x: (s.rnn(x)[0], 1.5), rnn=gru()), refused="output", says="float"
    ),
    Shape(
        "an input without time",
        lambda: made(lambda s, x, u: s.rnn(x)[0] + u[:, None], rnn=gru()),
        lambda: {"x": torch.randn(2, 5, 4), "u": torch.randn(2, 6)},
        refused="batch_time",
    ),
    Shape(
        "one integer value only",
        lambda: made(lambda s, x: s.rnn(functional.one_hot(x, 4).float())[0], rnn=gru()),
        lambda: {"x": torch.zeros(2, 5, dtype=torch.int64)},
        refused="input",
        says="one value",
    ),
    Shape(
        "a name forward lacks",
        lambda: made(per_step, rnn=gru(), head=head()),
        lambda: {"z": torch.randn(2, 5, 4)},
        refused="input",
    ),
    Shape("NaN", lambda: made(lambda s, x: s.rnn(x)[0].log(), rnn=gru()), refused="not_finite"),
    Shape(
        "a branch on values",
        lambda: made(lambda s, x: s.rnn(x)[0] * (2 if x.sum() > 0 else 3), rnn=gru()),
        refused="not_exportable",
    ),
    Shape(
        "a branch on the length",
        lambda: made(lambda s, x: s.rnn(x[:, -50:] if x.shape[1] > 50 else x)[0], rnn=gru()),
        refused="not_exportable",
        says="time",
    ),
    Shape(
        "a table of positions",
        lambda: made(
            lambda s, x: s.rnn(x + s.table[: x.shape[1]])[0], rnn=gru(), table=nn.Parameter(torch.randn(30, 4))
        ),
        refused="not_exportable",
        says="time",
    ),
    Shape(
        "fixed length",
        lambda: made(lambda s, x: s.head(s.rnn(x)[0].flatten(1)), rnn=gru(), head=nn.Linear(42, 2)),
        refused="forward_failed",
    ),
]
