"""Recurrent layers among other layers, in every layout, with many inputs and outputs. All stream."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from conformance.kinds.kind import Kind, gru, head, lstm, made, per_step, rnn


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


class Custom(nn.GRU):
    """A user's own subclass of a recurrent layer."""

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        out, h = super().forward(input * 2, hx)
        return out + 1, h


def normed(layer: nn.LSTM) -> nn.Module:
    """A spectral norm, as training leaves it: each call improves its estimate."""
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


def pointwise_conv(s: Any, x: Tensor) -> Tensor:
    return s.rnn(s.conv(x.transpose(1, 2)).transpose(1, 2))[0]


def packed(s: Any, x: Tensor) -> Tensor:
    lengths = torch.full((x.shape[0],), x.shape[1])
    return pad_packed_sequence(s.rnn(pack_padded_sequence(x, lengths, batch_first=True))[0], batch_first=True)[0]


def packed_with(s: Any, x: Tensor, lengths: Tensor) -> Any:
    p = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    out, sizes = pad_packed_sequence(s.rnn(p)[0], batch_first=True)
    return s.head(out), out[torch.arange(out.shape[0]), sizes - 1]


def two_results(s: Any, x: Tensor) -> dict[str, Tensor]:
    y, (h, _) = s.rnn(x)
    return {"steps": s.head(y), "last": s.head(h[-1]), "choice": s.head(y).argmax(-1)}


def state_dropped(s: Any, x: Tensor, hc: Any = None) -> Any:
    y, hc = s.rnn(x, hc)
    return s.head(y), hc


def pair(one: int, two: int) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 5, one), "u": torch.randn(2, 5, two)}


LAYERS = [
    Kind("lstm", lambda: made(per_step, rnn=lstm(layers=2), head=head())),
    Kind("gru", lambda: made(per_step, rnn=gru(layers=3), head=head())),
    Kind("rnn tanh", lambda: made(per_step, rnn=rnn(layers=4), head=head())),
    Kind("rnn relu", lambda: made(per_step, rnn=rnn(layers=2, nonlinearity="relu"), head=head())),
    Kind("no bias", lambda: made(per_step, rnn=lstm(layers=2, bias=False), head=head())),
    Kind("dropout, in training mode", lambda: made(per_step, rnn=gru(layers=2, dropout=0.5), head=head()).train()),
    Kind("embedding, LSTM, norm, GRU", Residual, lambda: {"tokens": torch.randint(0, 11, (2, 9))}),
    Kind("a bare nn.LSTM", lambda: lstm(layers=2), lambda: {"input": torch.randn(1, 5, 4)}),
    Kind(
        "time first throughout",
        lambda: made(per_step, rnn=nn.GRU(4, 6, 2), head=head()),
        lambda: {"x": torch.randn(7, 2, 4)},
        {"batch_first": False},
    ),
    Kind(
        "time first inside",
        lambda: made(lambda s, x: s.rnn(x.transpose(0, 1))[0].transpose(0, 1), rnn=nn.LSTM(4, 6)),
    ),
    Kind("time first outside", lambda: made(lambda s, x: s.rnn(x)[0].permute(1, 2, 0), rnn=gru())),
    Kind(
        "last step by out", lambda: made(lambda s, x: s.head(s.rnn(x)[0][:, -1]), rnn=gru(), head=head()), ragged=False
    ),
    Kind("last step by h_n", lambda: made(lambda s, x: s.head(s.rnn(x)[1][-1]), rnn=gru(layers=2), head=head())),
    Kind("h_n alone", lambda: made(lambda s, x: s.rnn(x)[1][0][-1], rnn=lstm())),
    Kind("only the state itself", lambda: made(lambda s, x: s.rnn(x)[1], rnn=gru(layers=2))),
    Kind("zeros passed", lambda: made(zeros_passed, rnn=lstm(layers=2), head=head())),
    Kind("learned initial state", lambda: made(learned, rnn=gru(), h0=nn.Parameter(torch.randn(1, 1, 6)))),
    Kind("state left out", lambda: made(state_dropped, rnn=lstm(layers=2), head=head())),
    Kind(
        "state given",
        lambda: made(state_dropped, rnn=lstm(layers=2), head=head()),
        lambda: {"x": torch.randn(2, 5, 4), "hc": (torch.full((2, 2, 6), 0.5), torch.full((2, 2, 6), -0.25))},
    ),
    Kind(
        "one module called twice",
        lambda: made(lambda s, x: s.rnn(s.rnn(x)[0])[0], rnn=gru(6, 6)),
        lambda: {"x": torch.randn(2, 5, 6)},
    ),
    Kind(
        "two inputs",
        lambda: made(lambda s, x, u: s.a(x)[0] + s.b(u)[0], a=gru(4, 6), b=lstm(3, 6)),
        lambda: pair(4, 3),
    ),
    Kind(
        "several outputs in a dict",
        lambda: made(two_results, rnn=lstm(), head=head()),
        outputs=("steps", "last", "choice"),
    ),
    Kind("tuple of outputs", lambda: made(lambda s, x: (s.rnn(x)[0], x * 2), rnn=gru()), outputs=("y0", "y1")),
    Kind(
        "named outputs",
        lambda: made(lambda s, x: (s.rnn(x)[0], x * 2), rnn=gru()),
        options={"output_names": ["a", "b"]},
        outputs=("a", "b"),
    ),
    Kind("a subclass of nn.GRU", lambda: Custom(4, 6, batch_first=True), lambda: {"input": torch.randn(2, 5, 4)}),
    Kind(
        "matrices as steps",
        lambda: made(lambda s, x: s.rnn(x.flatten(2))[0], rnn=gru(6, 5)),
        lambda: {"x": torch.randn(2, 5, 2, 3)},
    ),
    Kind(
        "batch norm",
        lambda: made(
            lambda s, x: s.rnn(s.norm(x.transpose(1, 2)).transpose(1, 2))[0], norm=nn.BatchNorm1d(4), rnn=gru()
        ),
    ),
    Kind("1x1 convolution", lambda: made(pointwise_conv, conv=nn.Conv1d(4, 4, 1), rnn=gru()), bit_exact=False),
    Kind(
        "inputs of wild scales",
        lambda: made(per_step, rnn=lstm(), head=head()),
        lambda: {"x": torch.randn(2, 7, 4) * torch.tensor([1e-3, 1.0, 30.0, 0.0])},
    ),
    Kind(
        "one-hot integers",
        lambda: made(lambda s, x: s.rnn(functional.one_hot(x, 4).float())[0], rnn=gru()),
        lambda: {"x": torch.randint(0, 4, (2, 5))},
    ),
    Kind("weight norm", lambda: made(per_step, rnn=parametrizations.weight_norm(gru(), "weight_hh_l0"), head=head())),
    Kind("spectral norm by hook", lambda: made(per_step, rnn=normed(lstm()), head=head())),
    Kind("weights flattened in forward", lambda: made(flattened, rnn=gru())),
    Kind(
        "names the exporter uses itself",
        lambda: made(lambda s, transpose: s.rnn(transpose)[0], rnn=gru()),
        lambda: {"transpose": torch.randn(2, 5, 4)},
    ),
    Kind("an input that is an output", lambda: made(lambda s, x: (s.rnn(x)[0], x), rnn=gru()), outputs=("y0", "y1")),
    Kind(
        "a mask",
        lambda: made(lambda s, x, mask: s.rnn(x)[0] * mask[..., None], rnn=gru()),
        lambda: {"x": torch.randn(2, 5, 4), "mask": torch.rand(2, 5) > 0.5},
    ),
    Kind(
        "an example of zeros, one step",
        lambda: made(per_step, rnn=gru(), head=head()),
        lambda: {"x": torch.zeros(1, 1, 4)},
    ),
    Kind("an attribute written for inspection", lambda: made(remembers, rnn=gru())),
    Kind("proj_size", lambda: made(per_step, rnn=lstm(layers=2, proj_size=3), head=head(3))),
    Kind(
        "proj_size, state given",
        lambda: made(state_dropped, rnn=lstm(proj_size=3, bias=False), head=head(3)),
        lambda: {"x": torch.randn(2, 5, 4), "hc": (torch.full((1, 2, 3), 0.5), torch.full((1, 2, 6), -0.25))},
    ),
    Kind("packed, all of one length", lambda: made(packed, rnn=gru())),
    Kind(
        "packed with lengths, last valid step",
        lambda: made(packed_with, rnn=lstm(layers=2), head=head()),
        lambda: {"x": torch.randn(3, 7, 4), "lengths": torch.tensor([5, 7, 3])},
        outputs=("y0", "y1"),
    ),
    Kind(
        "a packed sequence in and out",
        lambda: gru(layers=2),
        lambda: {"input": pack_padded_sequence(torch.randn(2, 7, 4), torch.tensor([7, 4]), batch_first=True)},
    ),
    Kind(
        "one sequence without a batch",
        lambda: made(per_step, rnn=nn.LSTM(4, 6, 2), head=head()),
        lambda: {"x": torch.randn(7, 4)},
    ),
]
