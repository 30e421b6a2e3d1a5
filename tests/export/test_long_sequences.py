"""Code that behaves differently late in a sequence or after many calls is detected; lookalikes are exported.

The kinds in `conformance/kinds/late.py` test the same through `export`.
"""

import cProfile
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.kinds.kind import made
from conformance.kinds.late import looping
from conformance.looping import LoopBlock
from conformance.trees import Loop
from unroll.export import ExportError, export
from unroll.export.lifting.kept_values import kept_values
from unroll.export.verification import branches
from unroll.export.verification.branches import BranchLog
from unroll.export.verification.iterations import OperationLog, irregular, step_of
from unroll.export.verification.large_numbers import find_large_numbers
from unroll.export.verification.trials import BRANCHES

CELL = nn.GRUCell(4, 6)


def first_irregular(module: nn.Module, steps: int = 200) -> int | None:
    """Return the first step that deviates, judged only by a log of the module's operations."""

    def logged(time: int) -> Any:
        log = OperationLog(module, [""], places=True)
        with torch.no_grad(), log.running():
            module(torch.randn(2, time, 4))
        return log.calls[""][0]

    short = len(logged(3).operations), len(logged(5).operations)
    call = logged(steps)
    index = irregular(call.operations, short, steps)
    return None if index is None else step_of(call, index, (short[1] - short[0]) // 2)


@pytest.mark.parametrize(
    "later",
    [
        lambda s, t, x, h: s.cell(x, h * (t != 70)),
        lambda s, t, x, h: s.cell(x, h) * (1.0 if t < 70 else 0.5),
        lambda s, t, x, h: s.cell(x, h.neg() if t == 70 else h),
        lambda s, t, x, h: s.cell(x, h) + s.table[max(t, 69)],
        lambda s, t, x, h: s.cell(x, s.first if t == 70 else h),
        lambda s, t, x, h: s.cell(x, h) * (torch.tensor(max(t, 69)) < 5000),
    ],
    ids=["product", "scale", "operation", "index", "operand", "tensor"],
)
def test_the_first_step_that_differs_is_found(later: Callable[..., Tensor]) -> None:
    assert first_irregular(looping(later, table=torch.zeros(300, 6), first=torch.zeros(2, 6))) == 70


def reversed_steps(s: Any, x: Tensor) -> Tensor:
    h, outs = x.new_zeros(x.shape[0], 6), []
    for t in reversed(range(x.shape[1])):
        h = s.cell(x[:, t], h)
        outs.insert(0, h)
    return torch.stack(outs, 1)


def filled(s: Any, x: Tensor) -> Tensor:
    h, y, t = None, x.new_zeros(x.shape[0], x.shape[1], 6), 0
    while t < x.shape[1]:
        if h is None:
            h = x.new_zeros(x.shape[0], 6)
        h = s.cell(x[:, t], h)
        y[:, t] = h
        t += 1
    return y


def delayed(s: Any, x: Tensor) -> Tensor:
    last, outs = deque([x.new_zeros(x.shape[0], 6)] * 3, maxlen=3), []
    for step in x.transpose(0, 1):
        last.append(s.cell(step, last[0]))
        outs.append(last[-1])
    return torch.stack(outs, 1)


def layers(s: Any, x: Tensor) -> Tensor:
    states, outs = [x.new_zeros(x.shape[0], 6) for _ in range(3)], []
    for step in x.unbind(1):
        below = step
        for layer, state in enumerate(states):
            states[layer] = s.cell(below, state)
            below = states[layer][:, :4]
        outs.append(states[-1])
    return torch.stack(outs, 1)


def firing(s: Any, x: Tensor) -> Tensor:
    """Creates a constant tensor in each step and keeps the state in a buffer."""
    s.state, outs = x.new_zeros(x.shape[0], 6), []
    for step in x.unbind(1):
        s.state = s.cell(step, s.state) * torch.as_tensor(s.scale)
        outs.append(s.state)
    return torch.stack(outs, 1)


@pytest.mark.parametrize("forward", [reversed_steps, filled, delayed, layers, firing])
def test_loops_of_every_form_are_regular(forward: Callable[..., Tensor]) -> None:
    parts = {"scale": torch.tensor(0.9), "state": nn.Buffer(torch.zeros(2, 6))}
    assert first_irregular(made(forward, cell=CELL, **parts)) is None


def branching(s: Any, x: Tensor) -> Tensor:
    """Every branch is decided: both arms run, the other arm raises, or the numbers compared do not grow."""
    h, outs, t, steps = None, [], 0, x.shape[1]
    if steps == 1:
        return x.repeat(1, 1, 2)[..., :6]
    while t < steps:
        if t > 10**6:
            raise ValueError(t)
        assert t >= 0
        t = t if not isinstance(t, (tuple, list)) else t[0]
        if x.shape[0] > 100 or len(outs) == 0:
            h = x.new_zeros(x.shape[0], 6)
        for layer in range(3):
            h = s.cell(x[:, t], h) if layer < 5 and t < steps - 1 else h
        match s.training:
            case True:
                outs = outs[: t + 1]
            case _ if t > 10**6:
                outs.append(h)
        outs.append(h)
        t += 1
    return torch.stack(outs, 1)


def by_number(s: Any, x: Tensor) -> Tensor:
    return torch.stack([step if t < 10**6 else -step for t, step in enumerate(x.unbind(1))], 1)


def by_count(s: Any, x: Tensor) -> Tensor:
    outs: list[Tensor] = []
    for step in x.unbind(1):
        if len(outs) > 10**6:
            outs = outs[:1]
        outs.append(step)
    return torch.stack(outs, 1)


def by_size(s: Any, x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] > 10**6 else x


LOG = logging.getLogger(__name__)


def _print_now_and_then(s: Any, t: int, x: Tensor, h: Tensor) -> Tensor:
    if (t + 1) % 10**6 == 0:
        print("step", t, float(h.mean()))
    if t == 10**6:
        LOG.info("step %s of %s: %s", t, x.shape[0], h.mean().item())
    return s.cell(x, h)


def _do_more(s: Any, t: int, x: Tensor, h: Tensor) -> Tensor:
    if t == 10**6:
        h.mul_(0)
    return s.cell(x, h)


def _count_down(s: Any, t: int, x: Tensor, h: Tensor) -> Tensor:
    return s.cell(x, h) if t >= 0 and not t < 0 else h


@pytest.mark.parametrize(
    ("later", "undecided"),
    [
        (_print_now_and_then, 0),
        (_count_down, 0),
        (lambda s, t, x, h: s.cell(x, [h, h][t % 2]), 0),
        (lambda s, t, x, h: s.cell(x, h) * (1 + t // 4), 0),
        (lambda s, t, x, h: s.cell(x, h * (s.cell(x, h).relu() > t)), 0),
        (lambda s, t, x, h: s.cell(x, h * (t > 0)), 0),
        (_do_more, 1),
        (lambda s, t, x, h: s.cell(x, h if t % 5000 else h * 0), 1),
        (lambda s, t, x, h: s.cell(x, h if t not in (0, 5000) else h * 0), 1),
        (lambda s, t, x, h: s.cell(x, h * (t < 5000)), 1),
        (lambda s, t, x, h: s.cell(x, h) * min(t, 5000), 1),
        (lambda s, t, x, h: s.cell(x, h) + t // 5000, 1),
        (lambda s, t, x, h: s.cell(x, h) + int(t / 5000), 1),
        (lambda s, t, x, h: s.cell(x, h) * {5000: 0.0}.get(t, 1.0), 1),
    ],
)
def test_growing_number_must_have_changed_a_result(later: Callable[..., Tensor], undecided: int) -> None:
    assert count_undecided(looping(later)) == undecided


def two_loops(s: Any, x: Tensor) -> Tensor:
    for reset in (10**6, 50):
        h, outs = x.new_zeros(x.shape[0], 4), []
        for t, step in enumerate(x.unbind(1)):
            h = s.cell(step, h if (t + 1) % reset else h * 0)
            outs.append(h)
        x = torch.stack(outs, 1).cumsum(1)
    return x


@pytest.mark.long
def test_the_step_is_found_in_the_second_of_two_loops(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"step 49 \(counted from 0\) differs from"):
        export(made(two_loops, cell=nn.GRUCell(4, 4)), {"x": torch.randn(2, 7, 4)}, name="m", repository=tmp_path)


def loop(s: Any, steps: Iterable[Tensor], size: int) -> Tensor:
    """Return (batch, size, 6), zero after the last step."""
    h, outs = torch.zeros(1, 6), []
    for step in steps:
        h = s.cell(step, h.expand(step.shape[0], 6).to(step.dtype))
        outs.append(h)
    return torch.stack(outs + [torch.zeros_like(h)] * (size - len(outs)), 1)


def by_table(s: Any, x: Tensor) -> Iterator[Tensor]:
    for t, step in enumerate(x.unbind(1)):
        try:
            scale = s.table[t]
        except IndexError:
            scale = 0.5
        yield step * scale


def by_iterator(s: Any, x: Tensor) -> Iterator[Tensor]:
    scales = iter(s.table)
    for step in x.unbind(1):
        yield step * next(scales, 0.5)


BY_LENGTH = {
    "slice": (lambda s, x: loop(s, x[:, :100].unbind(1), x.shape[1]), {}),
    "window": (lambda s, x: loop(s, x[:, -s.most :].unbind(1), x.shape[1]), {}),
    "product": (lambda s, x: loop(s, x[:, -2 * s.half :].unbind(1), x.shape[1]), {"half": 50}),
    "zip": (lambda s, x: loop(s, (step for step, _ in zip(x.unbind(1), range(100), strict=False)), x.shape[1]), {}),
    "islice": (lambda s, x: loop(s, itertools.islice(x.unbind(1), s.most), x.shape[1]), {}),
    "IndexError": (lambda s, x: loop(s, by_table(s, x), x.shape[1]), {"table": [1.0] * 100}),
    "iterator": (lambda s, x: loop(s, by_iterator(s, x), x.shape[1]), {"table": (1.0,) * 100}),
    "a mask after the loop": (
        lambda s, x: loop(s, x.unbind(1), x.shape[1]) * (torch.arange(x.shape[1]) < s.most)[:, None],
        {},
    ),
    "a late row of a table": (
        lambda s, x: loop(s, (step * s.table[t] for t, step in enumerate(x.unbind(1))), x.shape[1]),
        {"table": nn.Buffer((torch.arange(120) < 100).float())},
    ),
    "a late row of a table, picked by select": (
        lambda s, x: loop(s, (step * s.table.select(0, t) for t, step in enumerate(x.unbind(1))), x.shape[1]),
        {"table": nn.Buffer((torch.arange(120) < 100).float())},
    ),
    "too long to try": (lambda s, x: loop(s, itertools.islice(x.unbind(1), 10**6), x.shape[1]), {}),
}


#: Cases that are detected like "slice" or refused like "zip".
LIKE_ANOTHER = {
    "window",
    "product",
    "islice",
    "iterator",
    "a late row of a table",
    "a late row of a table, picked by select",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LIKE_ANOTHER else []) for name in BY_LENGTH]
)
def test_lengths_named_in_the_code_are_tried(name: str, few_steps: None, tmp_path: Path) -> None:
    forward, parts = BY_LENGTH[name]
    with pytest.raises(ExportError, match=r"test_long_sequences\.py:\d+") as refusal:
        export(made(forward, cell=CELL, most=100, **parts), {"x": torch.randn(2, 7, 4)}, name="m", repository=tmp_path)
    assert refusal.value.code in {"calls_depend_on_time", "parity", "not_exportable"}


def rarely_looks(s: Any, t: int, x: Tensor, h: Tensor) -> Tensor:
    """Every branch is rare, and none changes the result."""
    if t % 100 == 99:
        s.seen = h
    if t < 80:
        h = s.cell(x, h)
    else:
        h = s.cell(x, h)
    return h


def test_rare_branches_without_a_difference_are_exported(few_steps: None, tmp_path: Path) -> None:
    said: list[str] = []
    report = export(
        looping(rarely_looks), {"x": torch.randn(2, 7, 4)}, name="m", repository=tmp_path, progress=said.append
    )
    assert report.manifest.streamable
    assert any(line.startswith("trying it over 100 time steps") for line in said)


def test_unknown_bytecode_refuses_loops(few_steps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "_watched", lambda code: {})
    branches.is_readable.cache_clear()
    try:
        with pytest.raises(ExportError, match="cannot be found out on Python"):
            export(looping(lambda s, t, x, h: s.cell(x, h)), {"x": torch.randn(2, 7, 4)}, name="m", repository=tmp_path)
    finally:
        branches.is_readable.cache_clear()


def test_profiler_around_export_gets_the_whole_profile() -> None:
    with cProfile.Profile() as profile:
        assert not find_large_numbers([lambda: None], 10)
        len(())
    profile.create_stats()
    assert any(name == "<built-in method builtins.len>" for _, _, name in profile.stats)


def test_number_without_source_is_undecided() -> None:
    names: dict[str, Any] = {}
    exec("def later(s, t, x, h): return s.cell(x, h * (t < 5000))", names)
    assert count_undecided(looping(names["later"])) == 1


def count_undecided(module: nn.Module) -> int:
    log = BranchLog()
    for time in BRANCHES:
        with log.running():
            module(torch.randn(2, time, 4))
    return len(log.undecided())


@pytest.mark.parametrize(("forward", "undecided"), [(branching, 0), (by_number, 1), (by_count, 1), (by_size, 1)])
def test_branch_on_a_growing_number_must_take_both_arms(forward: Callable[..., Tensor], undecided: int) -> None:
    assert count_undecided(made(forward, cell=CELL)) == undecided


def test_items_are_not_taken_out_of_a_queue_twice() -> None:
    def queued(s: Any, x: Tensor) -> Tensor:
        waiting: Queue[Tensor] = Queue()
        for step in x.unbind(1):
            waiting.put(step)
        return torch.stack([waiting.get(timeout=1) for _ in range(x.shape[1])], 1)

    assert count_undecided(made(queued)) == 0


@pytest.mark.parametrize("iterates", ["range", "while", "filled"])
def test_code_before_a_condition_is_not_part_of_it(iterates: Any) -> None:
    assert count_undecided(LoopBlock(Loop("GRUCell", 4, 6, iterates))) == 0


@pytest.mark.long
def test_a_chaotic_loop_is_exported(tmp_path: Path) -> None:
    """Rounding errors alone change the outputs after a few hundred steps."""
    torch.manual_seed(0)
    module = looping(lambda s, t, x, h: torch.tanh(s.w(x) + h @ s.u), w=nn.Linear(4, 6), u=torch.randn(6, 6) * 4)
    assert export(module, {"x": torch.randn(2, 7, 4)}, name="m", repository=tmp_path).manifest.streamable


class Watching(nn.Module):
    """Records its inputs and builds a table once; later calls read neither."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(4)
        self.level, self.last, self.names = float(x.mean()), [x, x * 2], {"rows": x.shape[0]}
        return x * self.table


def test_values_written_but_never_read_are_not_kept() -> None:
    module = Watching()
    module(torch.zeros(2, 3, 4))
    before = kept_values(module)
    module(torch.ones(2, 3, 4))
    assert kept_values(module) == before
