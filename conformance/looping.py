"""Blocks of random models that loop over time in Python or count their calls; some change their behaviour later."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from conformance.trees import Counter, Loop


class Scale:
    """A helper that is no module."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, h: Tensor) -> Tensor:
        return h * self.weights


class LoopBlock(nn.Module):
    def __init__(self, block: Loop) -> None:
        super().__init__()
        self.block = block
        inputs, hidden = block.inputs, block.hidden
        self.scales = (1.0,) * block.when
        self.table = nn.Buffer(0.5 + torch.rand(1_000))
        self.to_memory = nn.Linear(inputs, hidden)
        self.scale = self._held(0.5 + 0.5 * torch.rand(hidden))
        self.h: Any = None
        if block.cell in {"LSTMCell", "GRUCell", "RNNCell", "GRU"}:
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
        memory = self._first(x)
        for t, step in self._ended(self._iterate(x)):
            if late == "stop" and t >= when:
                break
            if late == "reset" and t % when == 0:
                h, c = torch.zeros_like(h), torch.zeros_like(c)
            if self.block.memory == "reset":
                h, c = (torch.where(self.to_memory(step)[:, :1] > 1, 0, state) for state in (h, c))
            before, now = h, t if late == "argument" else 0
            h, c = self._step(step, h, c, now)
            h, memory = self._remember(step, h, memory)
            h = self._later(self._scaled(h), before, t, time, outs)
            outs.append(h)
            if self.block.iterates == "filled":
                y[:, t] = h
        if self.block.iterates == "filled":
            return y
        outs += [h] * (time - len(outs) if late in {"stop", "window", "slice", "zip", "islice"} else 0)
        return torch.stack(outs[::-1] if self.block.iterates == "reversed" else outs, 1)

    def _held(self, weights: Tensor) -> Any:
        match self.block.holds:
            case "dict":
                return {"weights": weights}
            case "list":
                return [weights]
            case "object":
                return Scale(weights)
            case "closure":
                return lambda h: h * weights
        return nn.Parameter(weights)

    def _scaled(self, h: Tensor) -> Tensor:
        match self.block.holds:
            case "dict":
                return h * self.scale["weights"]
            case "list":
                return h * self.scale[0]
            case "object" | "closure":
                return self.scale(h)
        return h * self.scale

    def _first(self, x: Tensor) -> Any:
        """The memory at the start of a sequence."""
        zeros = x.new_zeros(x.shape[0], self.block.hidden)
        match self.block.memory:
            case "row of a table":
                return torch.zeros(x.shape[0], dtype=torch.long)
            case "mean" | "debounce":
                return x.new_zeros(x.shape[0], 1), zeros
            case "average":
                return None
            case "ring":
                return [zeros] * 3
            case "window":
                return zeros.unsqueeze(1).expand(-1, 3, -1)
            case "dict":
                return {"last": zeros, "sum": zeros}
            case "attribute":
                self.h = zeros
            case "count" | "hysteresis" | "masked":
                return x.new_zeros(x.shape[0], 1)
        return zeros

    def _remember(self, step: Tensor, h: Tensor, memory: Any) -> tuple[Tensor, Any]:
        new = self.to_memory(step)
        match self.block.memory:
            case "count":
                memory = memory + 1
                return h + 1 / memory, memory
            case "row of a table":
                return h + self.table[memory % 24].unsqueeze(1), memory + 1
            case "mean":
                count, mean = memory[0] + 1, memory[1]
                mean = mean + (new - mean) / count
                return h - mean, (count, mean)
            case "average":
                memory = new if memory is None else torch.lerp(memory, new, 0.1)
                return h + memory, memory
            case "ring":
                memory = [*memory[1:], new]
                return h + sum(memory) / 3, memory
            case "window":
                memory = torch.cat([memory[:, 1:], new.unsqueeze(1)], 1)
                return h + memory.mean(1), memory
            case "hysteresis":
                memory = torch.where(new[:, :1] > 0.5, 1, torch.where(new[:, :1] < -0.5, 0, memory))
                return h * (1 - memory / 2), memory
            case "debounce":
                count, held = memory
                count = torch.where(new[:, :1] > 0, count + 1, torch.zeros_like(count))
                held = torch.where(count >= 3, new, held)
                return h + held, (count, held)
            case "peak":
                memory = torch.maximum(memory * 0.9, new.abs())
                return h / (1 + memory), memory
            case "dict":
                memory["sum"] = 0.9 * memory["sum"] + memory["last"]
                memory["last"] = new
                return h + memory["sum"], memory
            case "attribute":
                self.h = torch.tanh(self.h + new)
                return h + self.h, memory
            case "masked":
                memory = memory.masked_fill(new[:, :1] > 1, 0) + 1
                return h + memory.log(), memory
        return h, memory

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
        if self.block.cell == "GRU":
            return self.cell(x[None], h[None])[0][0], c
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
