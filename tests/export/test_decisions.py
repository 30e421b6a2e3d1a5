"""A data-dependent branch is fixed to one arm if forward shows that this arm computes the same as both."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.kinds.kind import made
from unroll.export.errors import ExportError
from unroll.export.source_lines import as_where
from unroll.export.verification.decisions import Decided, Undecided, check, decide, notes_on_ways


def reset(s: Any, x: Tensor, done: Tensor) -> Tensor:
    h, ys = x.new_zeros(len(x), 6), []
    for t in range(x.shape[1]):
        if done[:, t].any():
            h = h * (1 - done[:, t]).unsqueeze(1)
        h = s.cell(x[:, t], h)
        ys.append(h)
    return torch.stack(ys, 1)


def whole_if_it_can(s: Any, x: Tensor, done: Tensor) -> Tensor:
    if torch.all(done == 0):
        return s.rnn(x)[0]
    h, ys = x.new_zeros(1, len(x), 6), []
    for t in range(x.shape[1]):
        y, h = s.rnn(x[:, t : t + 1], h * (1 - done[:, t])[None, :, None])
        ys.append(y)
    return torch.cat(ys, 1)


def checked(s: Any, x: Tensor, done: Tensor) -> Tensor:
    assert torch.isfinite(x).all()
    if done.isnan().any():
        raise ValueError("not a number")
    return s.rnn(x)[0]


def doubled(s: Any, x: Tensor, done: Tensor) -> Tensor:
    y: Tensor = s.rnn(x)[0]
    if done.any():
        y = 2 * y
    return y


def rare(s: Any, x: Tensor, done: Tensor) -> Tensor:
    y: Tensor = s.rnn(x)[0]
    if (x > 1e6).any():
        y = 2 * y
    return y


def started(s: Any, x: Tensor, done: Tensor) -> Tensor:
    n, ys = x.new_zeros(len(x), 4), []
    for step in x.unbind(1):
        if torch.all(n == 0.0):
            n = step.abs() + 1
        else:
            n = torch.max(step, n - 0.1)
        ys.append(n)
    return torch.stack(ys, 1)


def beyond(s: Any, x: Tensor, done: Tensor) -> Tensor:
    if x.abs().max() <= 50:
        z = x
    else:
        z = x.clamp(-1000, 1000)
    return s.rnn(z)[0] + z.sum(-1, keepdim=True)


def both(s: Any, x: Tensor, done: Tensor) -> Tensor:
    y: Tensor = s.rnn(x)[0]
    if x.abs().sum() == 0 and done.sum() == 0:
        y = y + 1
    return y


def within(s: Any, x: Tensor, done: Tensor) -> Tensor:
    y: Tensor = s.rnn(x)[0]
    if done.sum() == 0:  # noqa: SIM102
        if (x.sum(-1) == 12.5).all():
            y = y + 1
    return y


def counted(s: Any, x: Tensor, done: Tensor) -> Tensor:
    y, count = s.rnn(x)[0], 0
    if x.abs().sum() == 0:
        count += 1
    if done.sum() == 0:
        count += 1
    return y + (count == 2)


def unending(s: Any, x: Tensor, done: Tensor) -> Tensor:
    y: Tensor = s.rnn(x)[0]
    while y.abs().max() > 0.1:
        y = y / 2
    return y


def narrow(s: Any, x: Tensor, done: Tensor) -> Tensor:
    y: Tensor = s.rnn(x)[0]
    if torch.isinf(y).any():
        y = y.clamp(-10, 10)
    return y


def decided(forward: Any) -> tuple[nn.Module, dict[str, Tensor], tuple[dict[Any, bool], Undecided]]:
    model = made(forward, rnn=nn.GRU(4, 6, batch_first=True), cell=nn.GRUCell(4, 6)).eval().double()
    example = {"x": torch.randn(2, 7, 4), "done": (torch.rand(2, 7) < 0.3).float()}
    return model, example, decide(model, example)


@pytest.mark.parametrize(
    ("forward", "way"),
    [
        (reset, [True]),
        (checked, [True, False]),
        (beyond, [False]),
        pytest.param(whole_if_it_can, [False], marks=pytest.mark.long),
        pytest.param(within, [True], marks=pytest.mark.long),
    ],
)
def test_branch_arm_equal_to_both_is_taken(forward: Any, way: list[bool]) -> None:
    model, _, (ways, others) = decided(forward)
    assert [*ways.values()] == way
    assert all("test_decisions.py:" in note for note in notes_on_ways(ways, others))
    for done in (torch.zeros(3, 9), torch.ones(3, 9), (torch.rand(3, 9) < 0.5).float()):
        x = torch.randn(3, 9, 4).double()
        expected = model(x=x, done=done.double())
        with Decided(ways):
            torch.testing.assert_close(model(x=x, done=done.double()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "forward",
    [doubled, started, counted, *[pytest.param(each, marks=pytest.mark.long) for each in (rare, both, unending)]],
)
def test_branch_arm_that_differs_or_is_unproven_is_not_taken(forward: Any) -> None:
    assert decided(forward)[2][0] == {}


def test_loop_trace_does_not_decide_a_condition_met_by_other_inputs() -> None:
    _, _, (ways, others) = decided(rare)
    assert ways == {}
    with pytest.raises(ExportError, match=r"test_decisions.py:.*torch\.where"):
        check(others)


def test_condition_that_no_input_meets_is_reported() -> None:
    _, _, (ways, others) = decided(narrow)
    check(others)
    (note,) = notes_on_ways(ways, others)
    assert "as if its condition were False: no tested input changes it" in note


def test_reverted_forward_is_unchanged() -> None:
    model, example, _ = decided(doubled)
    x, zeros = example["x"].double(), torch.zeros(2, 7).double()
    expected = model(x=x, done=zeros)
    with Decided({}) as watch:
        model(x=x, done=zeros)
    with Decided(dict.fromkeys(watch.seen, True)):
        torch.testing.assert_close(model(x=x, done=zeros), 2 * expected)
        with Decided.as_written():
            torch.testing.assert_close(model(x=x, done=zeros), expected)


def test_refusal_suggests_torch_where_for_the_branch() -> None:
    with pytest.raises(RuntimeError) as raised:
        started(None, torch.ones(2, 3, 4, device="meta"), torch.ones(2, 3))
    assert as_where(raised.value) == "n = torch.where(n == 0.0, step.abs() + 1, torch.max(step, n - 0.1))"
