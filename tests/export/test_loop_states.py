"""A loop over time may carry inputs and results, under several names and over several steps."""

import warnings
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from oracle import Oracle
from torch import Tensor, nn
from torch.nn import functional

from conformance.kinds.kind import Forward, made
from unroll.export import ExportError, export


def zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], 4)


def many_names(s: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Carries the last two inputs, the state before the update, and two aliased states."""
    h, older, other, before, second, outs = zeros(x), zeros(x), zeros(x) + 1, zeros(x), zeros(x), []
    for t in range(x.shape[1]):
        outs.append(torch.cat([h, before], 1))
        new = torch.tanh(x[:, t] + s.r * h - before + 0.1 * second - older + other)
        second, before, older, h = before, x[:, t], h, new
        other = h
    return torch.stack(outs, 1), h, before


def previous_of_unbound(s: Any, x: Tensor) -> Tensor:
    before, outs = torch.zeros(x.shape[0], 2), []
    for step in s.head(x).unbind(1):
        outs.append(torch.cat([step[:, :2] - before, s.r.expand(x.shape[0], -1)], 1))
        before = step[:, 2:]
    return torch.stack(outs, 1)


def previous_from_the_first(s: Any, x: Tensor) -> Tensor:
    h, before, outs = zeros(x), x[:, 0], []
    for t in range(x.shape[1]):
        h = torch.tanh(h * s.r + x[:, t] - before)
        outs.append(h)
        before = x[:, t]
    return torch.stack(outs, 1)


def previous_by_index(s: Any, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.shape[1]):
        before = x[:, t - 1 : t] if t else torch.zeros(x.shape[0], 1, 4)
        outs.append(s.head(x[:, t : t + 1] - before))
    return torch.cat(outs, 1)


def delayed(s: Any, x: Tensor) -> Tensor:
    """Only carries values, and computes none."""
    before, outs = zeros(x), []
    for t in range(x.shape[1]):
        outs.append(before)
        before = x[:, t]
    return s.head(torch.stack(outs, 1))


def swapped(s: Any, x: Tensor) -> Tensor:
    a, b, outs = zeros(x), zeros(x) + 1, []
    for t in range(x.shape[1]):
        a, b = b, a
        a = torch.tanh(a * s.r + x[:, t])
        outs.append(a + b)
    return torch.stack(outs, 1)


def window(s: Any, x: Tensor) -> Tensor:
    steps, outs = deque([zeros(x)] * 6, maxlen=6), []
    for t in range(x.shape[1]):
        steps.append(x[:, t])
        outs.append(s.head(torch.stack(list(steps)).mean(0)))
    return torch.stack(outs, 1)


class Helper:
    """No module; without `__dict__`."""

    __slots__ = ("steps",)


def window_in_a_helper(s: Any, x: Tensor) -> Tensor:
    s.helper.steps = deque([zeros(x)] * 3, maxlen=3)
    total, outs = zeros(x).double(), []
    for t in range(x.shape[1]):
        s.helper.steps.append(s.head(x[:, t]))
        total = 0.5 * total + sum(s.helper.steps).double()
        outs.append(total.float())
    return torch.stack(outs, 1)


def window_of_states(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h, states, outs = zeros(x), [zeros(x)] * 3, []
    for t in range(x.shape[1]):
        h = torch.tanh(s.head(x[:, t]) + s.r * states[0])
        states = [*states[1:], h]
        outs.append(h)
    return torch.stack(outs, 1), torch.stack(states, 1)


def dilated(s: Any, x: Tensor) -> Tensor:
    hs = [zeros(x)] * 3
    for step in x.unbind(1):
        hs.append(torch.tanh(s.head(step) + s.r * hs[-3]))
    return torch.stack(hs[3:], 1)


def two_loops(s: Any, x: Tensor) -> Tensor:
    return previous_from_the_first(s, s.head(delayed(s, x)))


def viewed(s: Any, x: Tensor) -> Tensor:
    h, before, outs = zeros(x).t(), x.new_zeros(x.shape[0], 2, 2), []
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] + h.t() * s.r + before.transpose(1, 2).reshape(-1, 4)).t()
        outs.append(h.t())
        before = x[:, t : t + 1].squeeze(1).view(-1, 2, 2)
    return torch.stack(outs, 1)


def changed_in_place(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both states are slices of one tensor."""
    states, outs = torch.zeros(2, x.shape[0], 4), []
    for t in range(x.shape[1]):
        states[0] = torch.tanh(s.head(x[:, t]) + s.r * states[1].clone())
        states[1] = states[0] - 0.5 * states[1].clone()
        outs.append(states[1].clone())
    return torch.stack(outs, 1), states


def cut_before(s: Any, x: Tensor) -> Tensor:
    h, outs, steps = zeros(x), [], [x[:, t] for t in range(x.shape[1])]
    for t, (step, same) in enumerate(zip(steps, x.unbind(1), strict=True)):
        h = torch.tanh(s.head(step + same) + s.r * h - x[:, t])
        outs.append(h)
    return torch.stack(outs, 1)


def layers_over_lists(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each layer iterates over the list of outputs of the layer before."""
    steps, last = list(x.split(1, 1)), []
    for layer in s.layers:
        h, outs = zeros(x).unsqueeze(1), []
        for step in [layer(step) for step in steps]:
            h = torch.tanh(step + s.r * h)
            outs.append(h)
        steps, last = outs, [*last, h]
    return torch.cat(steps, 1), torch.cat(last, 1)


def from_the_first(s: Any, x: Tensor) -> Tensor:
    """Reads the first step in every step, inside the loop and after it."""
    h, outs, first = zeros(x), [], x[:, 0]
    for step in x.unbind(1):
        h = torch.tanh(s.head(step - first) + s.r * h)
        outs.append(h)
    return torch.stack(outs, 1) / (1 + x[:, :1].abs())


def recurrence(x: Tensor, r: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    outs: list[Tensor] = []
    for t in range(x.size(1)):
        h = torch.tanh(x[:, t] + r * h)
        outs += [h]
    return torch.stack(outs, 1)


def row_after_row(s: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for row in range(x.shape[0]):
        h = torch.zeros(4)
        for t in range(x.shape[1]):
            y[row, t] = h = torch.tanh(s.head(x[row, t]) + s.r * h)
    return y


def count_of_all_rows(s: Any, x: Tensor) -> Tensor:
    h, n, outs = zeros(x), torch.zeros(1), []
    for step in x.unbind(1):
        n = n + 1
        h = torch.tanh(step + s.r * h)
        outs.append(s.head(h) / n)
    return torch.stack(outs, 1)


def running(s: Any, x: Tensor) -> Tensor:
    x = torch.cummax(x, 1).values - x.cummin(dim=1)[0] + x.sigmoid().cumprod(1) + torch.logcumsumexp(x, 1)
    return recurrence(x, s.r)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated but still in use
    scripted = torch.jit.script(recurrence)


def in_a_scripted_function(s: Any, x: Tensor) -> Tensor:
    return scripted(s.head(x), s.r)


@torch.library.custom_op("tests::recurrence", mutates_args=())
def operator(x: Tensor, r: Tensor) -> Tensor:
    return recurrence(x, r)


def in_a_custom_operator(s: Any, x: Tensor) -> Tensor:
    y: Tensor = torch.ops.tests.recurrence(s.head(x), s.r)
    return y


def changed_through_a_view(s: Any, x: Tensor) -> Tensor:
    h, states, outs = torch.zeros(1, x.shape[0], 4), torch.zeros(2, x.shape[0], 4), []
    for step in x.unbind(1):
        before = h.view(h.size(1), -1)
        parts = s.head(step) + s.head(before)
        for k in range(2):
            states[k] = torch.tanh(states[k].clone() * s.r + parts)
        h = torch.zeros(1, x.shape[0], 4)
        for state in states.unbind(0):
            h += state
        outs.append(h[0].clone())
    return torch.stack(outs, 1)


OTHERS: list[Forward] = [
    *(previous_of_unbound, previous_from_the_first, previous_by_index, delayed, swapped, window, window_of_states),
    window_in_a_helper,
    *(two_loops, many_names, changed_in_place, in_a_scripted_function, in_a_custom_operator, layers_over_lists),
    *(from_the_first, row_after_row, count_of_all_rows, running, viewed, changed_through_a_view, dilated),
]


@pytest.mark.parametrize("forward", [cut_before, *(pytest.param(one, marks=pytest.mark.long) for one in OTHERS)])
def test_loop_may_carry_its_inputs_and_results(few_steps: None, tmp_path: Path, forward: Forward) -> None:
    layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
    answers_step_by_step(
        made(forward, r=nn.Parameter(torch.rand(4) / 2), head=nn.Linear(4, 4), layers=layers, helper=Helper()), tmp_path
    )


def greatest_of_three(s: Any, x: Tensor) -> Tensor:
    padded = functional.pad(s.rnn(x)[0].mT, (2, 0), value=-torch.inf)
    return functional.max_pool1d(padded, 3, stride=1).mT


def with_weights_dropped(s: Any, x: Tensor) -> Tensor:
    """In eval mode, dropout returns the parameter itself."""
    s.rnn.weight_hh_l0 = functional.dropout(s.raw, 0.3, s.training)
    y: Tensor = s.rnn(x)[0]
    return y


@pytest.mark.long
def position_before_a_linear_layer(s: Any, x: Tensor) -> Tensor:
    y: Tensor = s.rnn(s.head(x + torch.arange(x.shape[1])[:, None] * 0.1))[0]
    return y


def selected_bools(s: Any, x: Tensor) -> Tensor:
    """Hysteresis: two thresholds."""
    size, on, outs = x.abs().mean(-1), torch.zeros(x.shape[0], dtype=torch.bool), []
    for t in range(x.shape[1]):
        on = torch.where(on, size[:, t] > 0.6, size[:, t] > 0.9)
        outs.append(on)
    y: Tensor = s.rnn(x * torch.stack(outs, 1)[..., None])[0]
    return y


def earliest_of_a_deque(s: Any, x: Tensor) -> Tensor:
    steps, outs = deque([zeros(x)] * 3, maxlen=3), []
    for t in range(x.shape[1]):
        outs.append(s.head(x[:, t] - steps[0]))
        steps.append(x[:, t])
    y: Tensor = s.rnn(torch.stack(outs, 1))[0]
    return y


@pytest.mark.parametrize(
    "forward",
    [
        *(greatest_of_three, with_weights_dropped),
        *(position_before_a_linear_layer, selected_bools, earliest_of_a_deque),
    ],
)
def test_what_surrounds_a_layer_streams(few_steps: None, tmp_path: Path, forward: Forward) -> None:
    rnn, raw = nn.GRU(4, 6, batch_first=True), nn.Parameter(torch.randn(18, 6))
    answers_step_by_step(made(forward, rnn=rnn, raw=raw, head=nn.Linear(4, 4)), tmp_path)


def answers_step_by_step(module: nn.Module, tmp_path: Path) -> None:
    manifest = export(module.eval(), {"x": torch.randn(2, 7, 4)}, name="m", repository=tmp_path).manifest
    assert manifest.streamable
    oracle, x, row, steps = Oracle(tmp_path, "m"), torch.randn(23, 4), None, []
    for step in x.numpy()[:, None]:
        (y, *_), row = oracle.all(step, state=row)
        steps.append(y[0])
    with torch.no_grad():
        returned = module(x[None])
    expected = returned[0] if isinstance(returned, tuple) else returned
    assert np.allclose(steps, expected[0].numpy(), atol=1e-5)


class RowAfterRow(nn.Module):
    """An LRU that processes the batch row by row and keeps the state in an attribute during the call."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.polar(torch.rand(6), torch.rand(6)))
        self.b = nn.Parameter(torch.randn(6, 4, dtype=torch.complex64))
        self.c = nn.Parameter(torch.randn(4, 6, dtype=torch.complex64))
        self.state = torch.zeros(6, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty(*x.shape[:2], 4)
        for row, steps in enumerate(x):
            for t, step in enumerate(steps):
                self.state = self.turn.to(x.device) * self.state + self.b @ step.to(dtype=self.b.dtype)
                y[row, t] = (self.c @ self.state).real
            self.state = torch.zeros_like(self.state)
        return y


class LinearRecurrence(nn.Module):
    """An LRU as its paper defines it."""

    def __init__(self) -> None:
        super().__init__()
        self.nu, self.theta, self.d = (nn.Parameter(torch.rand(size)) for size in (6, 6, 4))
        self.b = nn.Parameter(torch.randn(6, 4, dtype=torch.complex64))
        self.c = nn.Parameter(torch.randn(4, 6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        turn = torch.exp(torch.complex(-self.nu.exp(), self.theta.exp()))
        h, outs = torch.zeros(x.shape[0], 6, dtype=torch.complex64), []
        for t in range(x.shape[1]):
            h = turn * h + (1 - turn.abs() ** 2).sqrt() * (x[:, t].to(torch.complex64) @ self.b.T)
            outs.append((h @ self.c.T).real + self.d * x[:, t])
        return torch.stack(outs, 1)


def state_space(s: Any, x: Tensor) -> Tensor:
    """The recurrent form of S4D with real parameters."""
    turn = torch.polar(torch.sigmoid(s.r), s.r) - 0.1j
    h, outs = x.new_zeros(x.shape[0], 4, dtype=torch.cfloat), []
    for step in x.unbind(1):
        h = torch.einsum("n,bn->bn", turn.conj(), h) + (turn - 1) / (1 + s.r) * step
        outs.append(torch.view_as_real(h).flatten(1))
    return torch.stack(outs, 1) * s.head(x).repeat(1, 1, 2)


@pytest.mark.long
@pytest.mark.parametrize("module", [LinearRecurrence, RowAfterRow, state_space])
def test_complex_states_are_pairs_of_real_numbers(few_steps: None, tmp_path: Path, module: Any) -> None:
    parts = {"r": nn.Parameter(torch.rand(4) / 2), "head": nn.Linear(4, 4)}
    answers_step_by_step(made(module, **parts) if module is state_space else module(), tmp_path)


class CountedLoop(nn.Module):
    """Loops over as many steps as its caller says, and also returns the state before the first."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.r = 1, nn.Parameter(torch.rand(4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        states = [zeros(x)]
        for t in range(self.steps):
            states.append(torch.tanh(x[:, t] + self.r * states[-1]))
        return torch.stack(states, 1)


def of_its_caller(s: Any, x: Tensor) -> Tensor:
    s.loop.steps = x.shape[1]
    y: Tensor = s.loop(x)[:, 1:]
    return y


@pytest.mark.long
def test_loop_that_depends_on_its_caller_is_lifted_with_it(few_steps: None, tmp_path: Path) -> None:
    answers_step_by_step(made(of_its_caller, loop=CountedLoop()), tmp_path)


def decaying(s: Any, x: Tensor) -> Tensor:
    h, outs = zeros(x), []
    for step in x.unbind(1):
        h = h * torch.exp(-s.r.exp()) + step
        outs.append(h)
    return torch.stack(outs, 1)


def test_values_computed_only_from_weights_are_constants(few_steps: None, tmp_path: Path) -> None:
    answers_step_by_step(made(decaying, r=nn.Parameter(torch.rand(4))), tmp_path)
    graph = onnx.ModelProto.FromString((tmp_path / "m" / "1" / "model.onnx").read_bytes()).graph
    (scan,) = (node for node in graph.node if node.op_type == "Scan")
    assert "Exp" not in {node.op_type for node in [*graph.node, *scan.attribute[0].g.node]}


def numbered(s: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for row in range(x.shape[0]):
        h = torch.full((4,), float(row >= 50))
        for t in range(x.shape[1]):
            y[row, t] = h = torch.tanh(s.head(x[row, t]) + s.r * h)
    return y


def test_rows_with_different_initial_states_are_refused(few_steps: None, tmp_path: Path) -> None:
    module = made(numbered, r=nn.Parameter(torch.rand(4)), head=nn.Linear(4, 4)).eval()
    with pytest.raises(ExportError, match=r"loops over the rows of a batch.*x\[:, t\] in place of"):
        export(module, {"x": torch.randn(2, 7, 4)}, name="m", repository=tmp_path)


def unlike_from_row_90(s: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for row in range(x.shape[0]):
        h, gain = torch.zeros(4), 1 + max(row - 90, 0)
        for t in range(x.shape[1]):
            y[row, t] = h = torch.tanh(s.head(x[row, t] * gain) + s.r * h)
    return y


@pytest.mark.long
def test_rows_that_may_differ_in_larger_batches_are_refused(few_steps: None, tmp_path: Path) -> None:
    module = made(unlike_from_row_90, r=nn.Parameter(torch.rand(4)), head=nn.Linear(4, 4)).eval()
    with pytest.raises(ExportError, match=r"over the rows of a batch, and a value depends.*gain = .*for 67 rows"):
        export(module, {"x": torch.randn(2, 7, 4)}, name="m", repository=tmp_path)


def scaled_by_the_loudest(s: Any, x: Tensor) -> Tensor:
    """Only a sequence louder than the example shows that every step reads all steps."""
    level = x.abs().amax((1, 2)).clamp(min=20)[:, None]
    h, outs = zeros(x), []
    for t in range(x.shape[1]):
        h = torch.tanh(s.head(x[:, t] / level) + s.r * h)
        outs.append(h)
    return torch.stack(outs, 1)


def louder_if_silent(s: Any, x: Tensor) -> Tensor:
    level = torch.relu(0.01 - x.abs().amax((1, 2)))[:, None]
    h, outs = zeros(x), []
    for t in range(x.shape[1]):
        h = torch.tanh(s.head(x[:, t] + level) + s.r * h)
        outs.append(h)
    return torch.stack(outs, 1)


@pytest.mark.parametrize(("forward", "scale"), [(scaled_by_the_loudest, "32"), (louder_if_silent, "0.001")])
def test_what_only_extreme_inputs_show_is_refused(
    few_steps: None, tmp_path: Path, forward: Forward, scale: str
) -> None:
    module = made(forward, r=nn.Parameter(torch.rand(4)), head=nn.Linear(4, 4)).eval()
    with pytest.raises(ExportError, match=f"inputs {scale} times the example's") as refusal:
        export(module, {"x": torch.randn(2, 7, 4)}, name="m", repository=tmp_path)
    assert refusal.value.code == "parity"


def squashed(s: Any, x: Tensor) -> Tensor:
    return torch.tanh(s.r * x).real


def complex_output(s: Any, x: Tensor) -> Tensor:
    return s.r * x


@pytest.mark.parametrize(
    ("forward", "says"), [(squashed, "forward calls torch.tanh with"), (complex_output, "an output is complex")]
)
def test_other_complex_numbers_are_refused_with_a_remedy(tmp_path: Path, forward: Forward, says: str) -> None:
    module = made(forward, r=nn.Parameter(torch.rand(4, dtype=torch.complex64))).eval()
    with pytest.raises(ExportError, match=rf"{says}.*two tensors, as torch\.view_as_real") as refused:
        export(module, {"x": torch.randn(2, 7, 4)}, name="m", repository=tmp_path)
    assert refused.value.code == "dtype"
