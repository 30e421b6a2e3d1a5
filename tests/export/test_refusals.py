"""Each refusal code has a section in the docs, and each message names the line in forward and the remedy."""

import re
from collections import deque
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from conformance.kinds.kind import gru, made
from unroll.export import ExportError, export
from unroll.export.errors import Code, first_line, untraceable

PAGE = (Path(__file__).parents[2] / "docs" / "refusals.md").read_text()


@pytest.mark.parametrize(
    ("module", "example", "options", "says"),
    [
        (nn.GRU, {}, {}, "an instance of nn.Module to export, not the class GRU"),
        (gru(), [torch.zeros(2, 7, 4)], {}, "a dict of tensors by the names of forward's arguments"),
        (gru(), {}, {"max_error": "small"}, "rates and max_error numbers"),
        (gru(), {}, {"precision": "float8"}, "'float8' is none of float32, float16, int8"),
        (gru(), {}, {"state": {"hx": 1}}, "names of inputs and outputs are strings"),
        (gru(), {}, {"state": ["hx"]}, "as in state={'h': 'y1'}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_of_other_types_are_refused(module: Any, example: Any, options: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=says):
        export(module, example, name="m", repository=tmp_path, **options)


def test_every_code_has_its_section() -> None:
    headings = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(headings))) == sorted(get_args(Code))


def plain_length(s: Any, x: Tensor) -> Tensor:
    steps = int(x.shape[1])
    return s.rnn(x + torch.zeros(steps, 1))[0]


def row_by_row(s: Any, x: Tensor) -> Tensor:
    rows = [s.rnn(row.unsqueeze(0))[0] for row in x]
    return torch.cat(rows)


class WholeNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = gru()

    def forward(self, x: Tensor) -> Tensor:
        n = x[..., :1].round().long()
        n = (n + 8) // (n.abs() + 1)
        return self.rnn(x + n)[0]


class NoOperator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.bessel = gru(), Bessel()

    def forward(self, x: Tensor) -> Tensor:
        return self.bessel(self.rnn(x)[0])


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.special.bessel_j0(x)


class Clockwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.slower = nn.GRUCell(4, 6), nn.GRUCell(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = slow = x.new_zeros(x.shape[0], 6)
        ys = []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            if t % 4 == 0:
                slow = self.slower(h, slow)
            ys.append(h + slow)
        return torch.stack(ys, 1)


class Total(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        total: Any = 0
        ys = []
        for step in x.unbind(1):
            total = total + self.linear(step)
            ys.append(total)
        return torch.stack(ys, 1)


def dilated(s: Any, x: Tensor) -> Tensor:
    batch, time, _ = x.shape
    x = functional.pad(x, (0, 0, 0, time % 2))
    y = s.rnn(x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(0, 1))[0]
    return y.unflatten(0, (batch, 2)).transpose(1, 2).flatten(1, 2)[:, :time]


def squashed(s: Any, x: Tensor) -> Tensor:
    y = torch.complex(s.rnn(x)[0], x.new_zeros(1)) * s.turn
    return torch.tanh(y).real


def selected(s: Any, x: Tensor) -> Tensor:
    h, outs = x.new_zeros(x.shape[0], 4), []
    for t in range(x.shape[1]):
        h = torch.tanh(h + torch.index_select(x, 1, torch.tensor([t])).squeeze(1))
        outs.append(h)
    return torch.stack(outs, 1)


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = gru(), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class MadeLate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = gru(), None

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(x)[0]
        self.head = self.head or nn.Linear(y.shape[-1], 3)
        return self.head(y)


class OwnTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = gru()

    def named_parameters(self, *args: Any, **options: Any) -> Any:
        raise KeyError("no tables")

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Filling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        h, steps, ys = x.new_zeros(x.shape[0], 6), deque(maxlen=3), []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            steps.append(h)
            ys.append(sum(steps))
        return torch.stack(ys, 1)


class Inverted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = gru()

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(x)[0]
        return y @ torch.linalg.inv(torch.eye(6) + y.mT @ y / 100)


def bytewise(s: Any, x: Tensor) -> Tensor:
    n, ys = torch.zeros(x.shape[0], 1, dtype=torch.uint8), []
    for step in x.unbind(1):
        n = n + 1
        ys.append(step * n)
    return torch.stack(ys, 1)


def without_values(s: Any, x: Tensor) -> Tensor:
    return s.rnn(x)[0][..., :0]


def sparse(s: Any, x: Tensor) -> Tensor:
    return s.rnn(x)[0].to_sparse()


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (selected, r"selects its time step with a tensor.*; select it with a number, as x\[:, t\]"),
        (Lazy, r"'head.weight' has no values: before the export, call a module with lazy layers once"),
        (MadeLate, r"makes parameters, as 'head.bias', in its first call.*make them in __init__"),
        (OwnTables, r"code of the module fails.*KeyError: 'no tables' \(at .*test_refusals.py:\d+: raise KeyError"),
        (Filling, r"\(at .*test_refusals.py:\d+: ys.append\(sum\(steps\)\)\).*start a list of earlier steps full"),
        (bytewise, r"the loop of 'Made' carries torch.uint8; keep it .* as with n.long\(\)"),
        (
            Inverted,
            r"inverts a matrix, .*\(at .*test_refusals.py:\d+: return y @ torch.linalg.inv.*ONNX has no operator",
        ),
        (without_values, r"output 'y' is \(2, \d, 0\), which holds no values; leave it out"),
        (sparse, r"forward returns a sparse or nested tensor; return a padded one, as with y.to_dense\(\)"),
        (plain_length, r"the length to a plain number.*\(at .*test_refusals.py:\d+: steps = int\(x.shape\[1\]\)\)"),
        (row_by_row, r"layer 'rnn' depends on the batch size; call it once on the whole batch"),
        (WholeNumbers, r"\(at .*test_refusals.py:\d+: n = \(n \+ 8\) // .*\): compute in floats, as torch.floor"),
        (NoOperator, r"bessel_j0 \(at .*test_refusals.py:\d+: return .*\) in 'bessel', which ONNX has no operator for"),
        (dilated, r"layer 'rnn' gets 4 sequences of 3 steps.*hs.append\(cell\(step, hs\[-2\]\)\)"),
        (
            Clockwork,
            r"not every step runs the same operations \(at .*test_refusals.py:\d+: slow = self.slower\(h, slow\)",
        ),
        (Total, r"starts a state from a number; start it from a tensor, as x.new_zeros\(x.shape\[0\], 6\)"),
        (squashed, r"torch.tanh with complex numbers \(at .*test_refusals.py:\d+: return torch.tanh\(y\).real\)"),
    ],
)
def test_a_refusal_names_the_line_and_the_remedy(few_steps: None, tmp_path: Path, forward: Any, says: str) -> None:
    turn = {"turn": nn.Parameter(torch.polar(torch.rand(6), torch.rand(6)))} if forward is squashed else {}
    module = forward() if isinstance(forward, type) else made(forward, rnn=gru(), **turn)
    with pytest.raises(ExportError) as refused:
        export(module, {"x": torch.randn(2, 5, 4)}, name="m", repository=tmp_path)
    assert re.search(says, str(refused.value)), refused.value
    assert list(tmp_path.iterdir()) == []


def test_a_loop_traced_for_one_batch_size_says_so() -> None:
    error = RuntimeError("Constraints violated (batch)!\n  - You marked batch as dynamic but your code specialized it")
    assert "'Filter' computes with one batch size only" in str(untraceable("'Filter'", error))


def test_a_tensor_cached_between_calls_says_so() -> None:
    error = RuntimeError("Constant tensor lifted_tensor_0 is not in the constants dictionary.")
    assert "forward keeps a tensor that it computes" in str(untraceable("forward", error))


def test_the_heading_of_a_message_is_followed_by_its_first_item() -> None:
    with pytest.raises(RuntimeError) as failed:
        nn.LSTM(4, 6).load_state_dict(nn.LSTM(5, 6).state_dict())
    assert "state_dict for LSTM: size mismatch for weight_ih_l0" in first_line(failed.value)
