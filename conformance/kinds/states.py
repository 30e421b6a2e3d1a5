"""States that forward receives, computes, returns or keeps in the module. All stream."""

from typing import Any

import torch
from torch import Tensor, nn

from conformance.kinds.kind import Kind, gru, head, lstm, made


class Stateful(nn.Module):
    """Keeps h in the module between calls, the way many scripts do."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = gru()
        self.h: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, self.h = self.rnn(x, self.h)
        return y


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
    """A causal convolution, as in streaming models."""
    joined = torch.cat([cache, x], 1)
    return s.rnn(s.conv(joined.transpose(1, 2)).transpose(1, 2))[0], joined[:, -3:]


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


STATES = [
    Kind("initial state from the first step", lambda: made(from_input, rnn=gru(), start=nn.Linear(4, 6))),
    Kind(
        "initial state from a static input",
        lambda: made(from_static, rnn=lstm(layers=2), start=nn.Linear(3, 24)),
        lambda: {"x": torch.randn(2, 7, 4), "known": torch.randn(2, 3)},
        {"static": ["known"]},
    ),
    Kind(
        "a loop that starts from a static input",
        lambda: made(loop_from_static, start=nn.Linear(3, 6), wx=nn.Linear(4, 6), u=nn.Parameter(torch.rand(6))),
        lambda: {"x": torch.randn(2, 7, 4), "known": torch.randn(2, 3)},
        {"static": ["known"]},
    ),
    Kind("state in self.h", Stateful),
    Kind(
        "state in a module within", lambda: nn.Sequential(Stateful(), head()), lambda: {"input": torch.randn(2, 7, 4)}
    ),
    Kind(
        "a cache in the module, beside h",
        lambda: made(cached, conv=nn.Conv1d(4, 4, 3), rnn=gru(), cache=None, h=None),
        ragged=False,
        bit_exact=False,
    ),
    Kind(
        "a cache that forward takes and returns",
        lambda: made(with_cache, conv=nn.Conv1d(4, 4, 4), rnn=gru()),
        lambda: {"x": torch.randn(2, 7, 4), "cache": torch.zeros(2, 3, 4)},
        {"state": {"cache": "y1"}},
        ragged=False,
        bit_exact=False,
    ),
    Kind(
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
    Kind("a loop over self.h", lambda: made(loop_over_own, cell=nn.GRUCell(4, 6), h=None)),
]
