"""Blocks of random models that loop over time in Python or count their calls; some change their behaviour later."""

import itertools
import math
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from conformance.trees import Counter, Loop


class LoopBlock(nn.Module):
    def __init__(self, block: Loop) -> None:
        super().__init__()
        self.block = block
        inputs, hidden = block.inputs, block.hidden
        self.scales = (1.0,) * block.when
        self.table = nn.Buffer(0.5 + torch.rand(1_000))
        if block.cell in {"LSTMCell", "GRUCell", "RNNCell"}:
            self.cell = getattr(nn, block.cell)(inputs, hidden)
        else:
            self.wx = nn.Linear(inputs, 4 * hidden)
            self.wh = nn.Linear(hidden, 4 * hidden, bias=False)
            self.norm = nn.LayerNorm(4 * hidden)
            self.peep = nn.Parameter(torch.randn(3, hidden) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        late, when, time = self.block.late, self.block.when, x.shape[1]
        if late == "window":
            x = x[:, -when:]
        if late == "slice":
            x = x[:, :when]
        h = x.new_zeros(x.shape[0], self.block.hidden)
        c = torch.zeros_like(h)
        y = x.new_zeros(x.shape[0], time, self.block.hidden)
        outs: list[Tensor] = []
        for t, step in self._ended(self._iterate(x)):
            if late == "stop" and t >= when:
                break
            if late == "reset" and t % when == 0:
                h, c = torch.zeros_like(h), torch.zeros_like(c)
            before, now = h, t if late == "argument" else 0
            h, c = self._step(step, h, c, now)
            h = self._later(h, before, t, time, outs)
            outs.append(h)
            if self.block.iterates == "filled":
                y[:, t] = h
        if self.block.iterates == "filled":
            return y
        outs += [h] * (time - len(outs) if late in {"stop", "window", "slice", "zip", "islice"} else 0)
        return torch.stack(outs[::-1] if self.block.iterates == "reversed" else outs, 1)

    def _ended(self, steps: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        match self.block.late:
            case "zip":
                return (step for step, _ in zip(steps, range(self.block.when), strict=False))
            case "islice":
                return itertools.islice(steps, self.block.when)
        return steps

    def _iterate(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        match self.block.iterates:
            case "enumerate":
                yield from enumerate(x.unbind(1))
            case "while":
                t = 0
                while t < x.shape[1]:
                    yield t, x[:, t]
                    t += 1
            case "steps":
                yield from zip(range(x.shape[1]), x.transpose(0, 1), strict=False)
            case "reversed":
                yield from ((t, x[:, t]) for t in reversed(range(x.shape[1])))
            case _:
                yield from ((t, x[:, t]) for t in range(x.shape[1]))

    def _later(self, h: Tensor, before: Tensor, t: int, time: int, outs: list[Tensor]) -> Tensor:
        when = self.block.when
        match self.block.late:
            case "copy" if t % when == when - 1:
                return before
            case "zero" if t < when:
                return torch.zeros_like(h)
            case "scale" if t >= when:
                return h * 0.5
            case "table":
                return h * self.table[t // when]
            case "phase":
                return h * (1 + 0.5 * math.sin(t / when))
            case "length" if time > when:
                return h * 0.5
            case "missing":
                try:
                    return h * self.scales[t]
                except IndexError:
                    return h * 0.5
            case "growing" if len(outs) > when:
                return h + outs[-when]
        return h

    def _step(self, x: Tensor, h: Tensor, c: Tensor, now: int) -> tuple[Tensor, Tensor]:
        if now > self.block.when:
            h = -h
        if self.block.cell == "LSTMCell":
            return self.cell(x, (h, c))
        if self.block.cell in {"GRUCell", "RNNCell"}:
            return self.cell(x, h), c
        if self.block.cell == "minimal":
            forget = (self.wx(x) + self.wh(h)).chunk(4, 1)[0].sigmoid()
            candidate = (self.wx(x) + self.wh(forget * h)).chunk(4, 1)[1].tanh()
            return (1 - forget) * h + forget * candidate, c
        gates = self.wx(x) + self.wh(h)
        i, f, g, o = (self.norm(gates) if self.block.cell == "layer norm" else gates).chunk(4, 1)
        peep = self.peep if self.block.cell == "peephole" else torch.zeros_like(self.peep)
        c = (f + peep[0] * c).sigmoid() * c + (i + peep[1] * c).sigmoid() * g.tanh()
        return (o + peep[2] * c).sigmoid() * c.tanh(), c


class Count:
    n = 0


#: A global counter of calls, as in a user's module.
COUNTS = {"calls": 0}


class CounterBlock(nn.Module):
    shared: ClassVar = Count()

    def __init__(self, block: Counter) -> None:
        super().__init__()
        self.block = block
        self.calls, self.by_name, self.each, self.own = 0, {"calls": 0}, [0], Count()
        self.array, self.random, self.iterator = np.zeros(1), np.random.default_rng(block.when), itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self._count() > self.block.when else x

    def _count(self) -> float:
        match self.block.kept:
            case "attribute":
                self.calls += 1
                return self.calls
            case "dict":
                self.by_name["calls"] += 1
                return self.by_name["calls"]
            case "list":
                self.each.append(0)
                return len(self.each)
            case "object":
                self.own.n += 1
                return self.own.n
            case "array":
                self.array += 1
                return float(self.array[0])
            case "generator":
                return self.block.when + self.random.random() - 0.95
            case "class":
                self.shared.n += 1
                return self.shared.n
            case "global":
                COUNTS["calls"] += 1
                return COUNTS["calls"]
            case _:
                return next(self.iterator)
