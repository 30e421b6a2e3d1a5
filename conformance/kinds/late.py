"""Modules whose behaviour changes later: after many steps, in long sequences, or after many calls. All are refused."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conformance.kinds.kind import Kind, gru, made

#: `later(s, t, x, h)`: the state after step `t`, from its input and the previous state.
Step = Callable[[Any, int, Tensor, Tensor], Tensor]


def looping(later: Step, **parts: Any) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        h, outs = x.new_zeros(x.shape[0], 6), []
        for t in range(x.shape[1]):
            h = later(s, t, x[:, t], h)
            outs.append(h)
        return torch.stack(outs, 1)

    return made(forward, cell=nn.GRUCell(4, 6), **parts)


def only_the_last(s: Any, x: Tensor) -> Tensor:
    x, h = x[:, -100:], x.new_zeros(x.shape[0], 6)
    for step in x.unbind(1):
        h = s.cell(step, h)
    return h


def only_the_first(s: Any, x: Tensor) -> Tensor:
    h, y = x.new_zeros(x.shape[0], 6), x.new_zeros(x.shape[0], x.shape[1], 6)
    for t in range(min(x.shape[1], 64)):
        h = s.cell(x[:, t], h)
        y[:, t] = h
    return y


def after_warm_up(s: Any, x: Tensor) -> Tensor:
    h, outs = x.new_zeros(x.shape[0], 6), []
    for t, step in enumerate(x.unbind(1)):
        h = s.cell(step, h)
        outs.append(torch.zeros_like(h) if t < 30 else h)
    return torch.stack(outs, 1)


def windows(s: Any, x: Tensor) -> Tensor:
    outs = []
    for begin in range(0, x.shape[1], 50):
        h = x.new_zeros(x.shape[0], 6)
        for step in x[:, begin : begin + 50].unbind(1):
            h = s.cell(step, h)
            outs.append(h)
    return torch.stack(outs, 1)


def by_length(s: Any, x: Tensor) -> Tensor:
    h, outs = x.new_zeros(x.shape[0], 6), []
    for step in x.unbind(1):
        h = s.cell(step, h)
        outs.append(h)
    y = torch.stack(outs, 1)
    return y * 2 if 100 < x.shape[1] < 200 else y


def counting(count: Callable[[Any], Any], **kept: Any) -> nn.Module:
    """Doubles the answer from call 50 on."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y: Tensor = s.rnn(x)[0]
        return y if count(s) < 50 else y * 2

    return made(forward, rnn=gru(), **kept)


def reset_by_calls(s: Any, x: Tensor) -> Tensor:
    s.calls += 1
    if s.calls % 50 == 0:
        s.h = None
    y, s.h = s.rnn(x, s.h)
    return y


def by_attribute(s: Any) -> int:
    s.state.calls += 1
    return s.state.calls


def by_key(s: Any) -> int:
    s.seen["calls"] += 1
    return s.seen["calls"]


def by_list(s: Any) -> int:
    s.seen.append(0)
    return len(s.seen)


def by_array(s: Any) -> float:
    s.seen += 1
    return float(s.seen[0])


def by_class(s: Any) -> int:
    type(s).calls = getattr(type(s), "calls", 0) + 1
    return type(s).calls


_CALLS = 0


def by_global(s: Any) -> int:
    global _CALLS
    _CALLS += 1
    return _CALLS % 100


def _late(name: str, build: Callable[[], nn.Module], says: str) -> Kind:
    return Kind(name, build, refused="calls_depend_on_time", says=says)


def _counted(name: str, build: Callable[[], nn.Module], says: str) -> Kind:
    return Kind(name, build, refused="keeps_state", says=says)


LATE = [
    _late(
        "a loop that begins again every 24 steps",
        lambda: looping(lambda s, t, x, h: s.cell(x, h if t % 24 else torch.zeros_like(h))),
        "step 24 (counted from 0)",
    ),
    _late(
        "a loop that skips every 168th step",
        lambda: looping(lambda s, t, x, h: h if t % 168 == 167 else s.cell(x, h)),
        "step 167 ",
    ),
    _late("a loop that returns nothing before step 30", lambda: made(after_warm_up, cell=nn.GRUCell(4, 6)), ""),
    _late(
        "a loop with a table that changes by day",
        lambda: looping(lambda s, t, x, h: s.cell(x, h) * s.table[t // 24], table=nn.Buffer(torch.rand(500))),
        "step 24 ",
    ),
    _late(
        "a loop that ends after a million steps",
        lambda: looping(lambda s, t, x, h: s.cell(x, h) if t < 1_000_000 else h),
        "t < 1_000_000",
    ),
    _late(
        "a loop that begins again every 5000 steps",
        lambda: looping(lambda s, t, x, h: s.cell(x, h if t % 5000 else torch.zeros_like(h))),
        "t % 5000",
    ),
    _late(
        "a loop that grows until step 5000",
        lambda: looping(
            lambda s, t, x, h: s.cell(x, h) + s.table[min(t, 5000) // 5000], table=nn.Buffer(torch.rand(2))
        ),
        "min(t, 5000)",
    ),
    _late("a loop over the last hundred steps", lambda: made(only_the_last, cell=nn.GRUCell(4, 6)), "step 100 "),
    _late("a loop over the first 64 steps", lambda: made(only_the_first, cell=nn.GRUCell(4, 6)), "step 64 "),
    _late("a loop in windows of 50", lambda: made(windows, cell=nn.GRUCell(4, 6)), "step 50 "),
    Kind(
        "a loop that depends on the length",
        lambda: made(by_length, cell=nn.GRUCell(4, 6)),
        refused="parity",
        says="128 time steps",
    ),
    _counted(
        "a state that every 50th call forgets", lambda: made(reset_by_calls, rnn=gru(), calls=0, h=None), "'calls'"
    ),
    _counted("calls counted in an object", lambda: counting(by_attribute, state=SimpleNamespace(calls=0)), "'state'"),
    _counted("calls counted in a dict", lambda: counting(by_key, seen={"calls": 0, "h": None}), "'seen'"),
    _counted("calls counted by a list", lambda: counting(by_list, seen=[]), "'seen'"),
    _counted("calls counted in an array", lambda: counting(by_array, seen=np.zeros(1)), "'seen'"),
    _counted(
        "a random generator of its own",
        lambda: counting(lambda s: s.seen.integers(51), seen=np.random.default_rng(0)),
        "'seen'",
    ),
    _counted("calls counted in the class", lambda: counting(by_class), "'Made.calls'"),
    _counted("calls counted in a global variable", lambda: counting(by_global), "'_CALLS'"),
]
