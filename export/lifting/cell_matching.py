"""Matches a handwritten loop body with PyTorch's LSTM, GRU or Elman cell.

The body's weights are tried in every gate order. PyTorch's own cell with these weights must compute the same in
float64, also far outside the range where activations are nearly linear. Then a single, faster ONNX node replaces the
scan.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, nn

from unroll.export.lifting.float64 import converted, double_precision
from unroll.export.lifting.scan import Scan

_GATES: dict[Any, int] = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}

#: The scale of each trial row: a clamp of the state, for example, shows only with large values.
_SCALES = (0.5, 1.0, 1.0, 10.0, 100.0, 1e4)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to build the weights of PyTorch's cell from those of a loop body.

    Attributes:
        kind: nn.LSTM, nn.GRU or nn.RNN.
        rows: rows of the matrices, over all gates.
        w, r, biases: names of the body's parameters.
        order: the body's gates in PyTorch's order.
        columns: the columns of `w` for the input, and of `r` for the state.
        swapped: the body carries c before h.
        flipped: the body's update gate is the complement of PyTorch's.
    """

    kind: Any
    rows: int
    nonlinearity: str
    w: str
    r: str
    biases: tuple[str, ...]
    order: tuple[int, ...]
    columns: tuple[slice, slice]
    swapped: bool = False
    flipped: bool = False

    def weights(self, body: nn.Module) -> list[Tensor]:
        """The cell's weight_ih, weight_hh, bias_ih and bias_hh."""
        named = dict(body.named_parameters())
        matrices = [named[name] if len(named[name]) == self.rows else named[name].T for name in (self.w, self.r)]
        w, r = (matrix[:, columns] for matrix, columns in zip(matrices, self.columns, strict=True))
        zero = torch.zeros(len(w), dtype=w.dtype)
        biases = [*(named[name].flatten() for name in self.biases), zero, zero][:2]
        return [self._ordered(weight) for weight in (w, r, *biases)]

    def _ordered(self, weight: Tensor) -> Tensor:
        gates = weight.chunk(_GATES[self.kind])
        chosen = [gates[index] for index in self.order]
        if self.flipped:
            chosen[1] = -chosen[1]
        return torch.cat(chosen)

    def layer(self, body: nn.Module) -> nn.RNNBase:
        weights = self.weights(body)
        options = {"nonlinearity": self.nonlinearity} if self.kind is nn.RNN else {}
        layer = self.kind(weights[0].shape[1], weights[1].shape[1], batch_first=True, **options)
        self.fill(layer, body)
        return layer.eval().requires_grad_(False)

    def fill(self, layer: nn.RNNBase, body: nn.Module) -> None:
        with torch.no_grad():
            for own, weight in zip(layer.parameters(), self.weights(body), strict=True):
                own.copy_(weight)


def match_cell(scan: Scan) -> Recipe | None:
    """Find the PyTorch layer that computes the same as the body of `scan`; None if there is none."""
    series = [axes for axes in scan.inputs if axes.time is not None]
    stacked = [axes for axes in scan.outputs if axes.time is not None]
    lasts = [final for axes, final in zip(scan.outputs, scan.finals, strict=True) if axes.time is None]
    if len(series) != 1 or len(stacked) != 1 or None in lasts or scan.backwards or len(scan.states) not in {1, 2}:
        return None
    x, y = series[0], stacked[0]
    hidden = {axes.shape[-1] for axes in (*scan.states, y)}
    if not all(axes.dtype.is_floating_point for axes in (x, *scan.states)):
        return None
    if len(x.shape) != 3 or {x.batch, x.time} != {0, 1} or len(hidden) > 1:
        return None
    if len(y.shape) != 3 or any(len(axes.shape) != 2 or axes.batch != 0 for axes in scan.states):
        return None
    inputs = [node for node in scan.body.graph.nodes if node.op == "placeholder"][: len(scan.inputs)]
    if any(node.users and axes.time is None for node, axes in zip(inputs, scan.inputs, strict=True)):
        return None
    body = converted(scan.body, torch.float64)
    given, states = _drawn(x.shape[2], hidden.pop(), len(scan.states))
    tensors = [
        given.unsqueeze(axes.time) if axes.time is not None else given.new_zeros(axes.with_batch(len(given)))
        for axes in scan.inputs
    ]
    with torch.no_grad(), double_precision():
        made = body(*tensors, *states)
        place = next(place for place, axes in enumerate(scan.outputs) if axes.time is not None)
        expected = [made[place].squeeze(y.time), *made[len(scan.outputs) :]]
        found = (recipe for recipe in _recipes(body, given, states) if _is_same(recipe, body, given, states, expected))
        return next(found, None)


def _drawn(features: int, hidden: int, states: int) -> tuple[Tensor, list[Tensor]]:
    random = torch.Generator().manual_seed(91)
    scales = torch.tensor(_SCALES, dtype=torch.float64).unsqueeze(1)

    def draw(size: int) -> Tensor:
        return scales * torch.randn(len(_SCALES), size, generator=random, dtype=torch.float64)

    return draw(features).clamp(-3, 3), [draw(hidden) for _ in range(states)]


def _recipes(body: nn.Module, x: Tensor, states: list[Tensor]) -> Iterator[Recipe]:
    features, hidden = x.shape[1], states[0].shape[1]
    for kind in (nn.LSTM,) if len(states) == 2 else (nn.GRU, nn.RNN):
        gates = _GATES[kind]
        named = [(name, tuple(p.shape)) for name, p in body.named_parameters()]
        rows = gates * hidden
        biases = tuple(name for name, shape in named if shape in {(rows,), (1, rows), (rows, 1)} and rows > 1)
        if len(biases) > 2:
            continue
        turns = dict.fromkeys([biases, biases[::-1]])
        for w, r, columns in _matrices(named, rows, features, hidden):
            for order, turn, swapped, flipped in product(
                permutations(range(gates)), turns, (False, True)[: len(states)], (False, True)[: 1 + (kind is nn.GRU)]
            ):
                for nonlinearity in ("tanh", "relu")[: 1 + (kind is nn.RNN)]:
                    yield Recipe(kind, rows, nonlinearity, w, r, turn, order, columns, swapped, flipped)


def _matrices(
    named: list[tuple[str, tuple[int, ...]]], rows: int, features: int, hidden: int
) -> Iterator[tuple[str, str, tuple[slice, slice]]]:
    whole = slice(None)

    def of(width: int) -> list[str]:
        return [name for name, shape in named if shape in {(rows, width), (width, rows)}]

    for w, r in product(of(features), of(hidden)):
        if w != r:
            yield w, r, (whole, whole)
    for name in of(features + hidden):
        yield name, name, (slice(0, features), slice(features, None))
        yield name, name, (slice(hidden, None), slice(0, hidden))


def _is_same(recipe: Recipe, body: nn.Module, x: Tensor, states: list[Tensor], expected: list[Tensor]) -> bool:
    weights = recipe.weights(body)
    if weights[0].shape[1] != x.shape[1] or weights[1].shape != (len(weights[0]), states[0].shape[1]):
        return False
    given = states[::-1] if recipe.swapped else states
    if recipe.kind is nn.LSTM:
        after = list(torch.lstm_cell(x, given, *weights))
    elif recipe.kind is nn.GRU:
        after = [torch.gru_cell(x, given[0], *weights)]
    else:
        cell = torch.rnn_tanh_cell if recipe.nonlinearity == "tanh" else torch.rnn_relu_cell
        after = [cell(x, given[0], *weights)]
    ours = [after[0], *(after[::-1] if recipe.swapped else after)]
    return all(torch.allclose(one, other, rtol=1e-12, atol=1e-12) for one, other in zip(ours, expected, strict=True))
