"""Python loops over time. All stream."""

from typing import Any

import torch
from torch import Tensor, nn

from conformance.kinds.kind import Kind, gru, head, made


def loop(s: Any, x: Tensor) -> Tensor:
    h = torch.zeros(1, x.shape[0], 6)
    outs = []
    for t in range(x.shape[1]):
        out, h = s.rnn(x[:, t : t + 1], h)
        outs.append(out)
    return torch.cat(outs, 1)


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


def stack_of_layers(s: Any, x: Tensor) -> Tensor:
    zeros = torch.zeros(x.shape[0], 6)
    y, _ = s.b(s.a(x.transpose(0, 1), (zeros, zeros))[0])
    return y.transpose(0, 1)


LOOPS = [
    Kind("loop over a layer", lambda: made(loop, rnn=gru())),
    Kind("loop over cells", lambda: made(cells, first=nn.LSTMCell(4, 6), second=nn.GRUCell(6, 5), head=head(5))),
    Kind(
        "loop in the open, last step, tokens",
        lambda: made(minimal, embed=nn.Embedding(9, 4), f=nn.Linear(10, 6), g=nn.Linear(10, 6)),
        lambda: {"x": torch.randint(0, 9, (2, 7))},
    ),
    Kind("loops of modules of their own", lambda: made(stack_of_layers, a=Layer(4, 6), b=Layer(6, 6, nn.Dropout(0.5)))),
]
