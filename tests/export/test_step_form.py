"""Modules with a forward of one time step: the bundle equals repeated calls of the module."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle
from torch import Tensor, nn

import unroll
from unroll import cli
from unroll.export import ExportError
from unroll.export.loading.example_inputs import step_examples
from unroll.export.loading.input_specs import InputSpec, StateSpec

#: Number of clients, and steps per client.
CLIENTS, STEPS = 4, 150

Arguments = dict[str, Any]


class Policy(nn.Module):
    """Takes states with the layer axis first, as PyTorch's layers do, and resets them at the end of an episode."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 5, 2), nn.Linear(5, 2)

    def forward(self, obs: Tensor, h: Tensor, c: Tensor, done: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep = 1 - done[None, :, None]
        y, (h, c) = self.rnn(obs[None], (h * keep, c * keep))
        return self.head(y[0]).tanh(), h, c


class Joined(Policy):
    """Takes and returns its states as a tuple."""

    def forward(self, obs: Tensor, hc: tuple[Tensor, Tensor], done: Tensor) -> Any:
        y, h, c = super().forward(obs, *hc, done)
        return y, (h, c)


class Swapped(nn.Module):
    """Returns its dict state with the keys in another order. The client's goal is a static input."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 5), nn.Linear(5, 2)

    def forward(self, obs: Tensor, state: dict[str, Tensor], goal: Tensor) -> Arguments:
        h, c = self.cell(obs, (state["h"], state["c"]))
        return {"action": self.head(h) - goal, "value": h.sum(-1), "state": {"c": c, "h": h}}


class OneClient(nn.Module):
    """Keeps its state in buffers for one client and changes them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 5, 2), nn.Linear(5, 2)
        self.register_buffer("hidden", torch.full((2, 1, 5), 0.3))

    def forward(self, obs: Tensor) -> Tensor:
        y, hidden = self.rnn(obs[None], self.hidden)
        self.hidden[:] = hidden
        return self.head(y[0])


class Hidden(nn.Module):
    """Keeps the state that its layer returned; it is None before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.hidden = nn.LSTM(3, 5, batch_first=True), None

    def forward(self, obs: Tensor) -> Tensor:
        y, self.hidden = self.rnn(obs[:, None], self.hidden)
        return y[:, 0]


class Optional(nn.Module):
    """Starts without a state; counts its steps as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 5)

    def forward(self, obs: Tensor, steps: Tensor, hx: Any = None) -> Any:
        y, hx = self.rnn(obs[None], hx)
        return y[0] / (1 + steps[:, None].float()), steps + 1, hx


class InPlace(nn.Module):
    """Changes the given state in place and returns it both as the state and as an output."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 5)

    def forward(self, obs: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h.copy_(self.mix(torch.cat([obs, h], -1)).tanh())
        return h, h


class RowsFirst(nn.Module):
    """Takes states with the client axis first, starts its delay from one row, and holds leftovers of training."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 5, 2, batch_first=True)
        self.register_buffer("last", torch.ones(1, 3))
        with torch.enable_grad():
            self.distribution = torch.distributions.Normal(self.rnn.weight_hh_l0.sum() * 2, 1.0)
        self.lock = threading.Lock()

    def forward(self, obs: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        states = h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()
        y, (h, c) = self.rnn(obs[:, None], states)
        before, self.last = self.last, obs
        return before, y[:, 0], h.transpose(0, 1), c.transpose(0, 1)


class Difference(nn.Module):
    """Keeps the previous input, which a repeated input leaves unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.before = torch.zeros(1, 3)

    def forward(self, obs: Tensor) -> Tensor:
        y, self.before = self.head(obs - self.before), obs
        return y


class Mirrored(nn.Module):
    """Also leaves the states it returns in buffers, which are empty before the first step and never read."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(3, 5)
        self.register_buffer("h", torch.zeros(0), persistent=False)
        self.register_buffer("c", torch.zeros(0), persistent=False)

    def forward(self, obs: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.h, self.c = h, c
        self.h, self.c = self.cell(obs, (self.h, self.c))
        return (self.h > 0.1).float(), self.h, self.c


def zeros(*size: int) -> Tensor:
    return torch.zeros(size)


OBS = torch.randn(6, 3)
GOAL = torch.randn(6, 2)
#: By name: the module, its example, the options, and a function that maps the last result (or None) to the next states.
CASES: dict[str, tuple[type[nn.Module], Arguments, Arguments, Callable[[Any], Arguments]]] = {
    "layer first": (
        Policy,
        {"obs": OBS, "h": zeros(2, 6, 5), "c": zeros(2, 6, 5), "done": torch.tensor([0.0, 0, 1, 0, 0, 1])},
        {"state": {"h": "y1", "c": "y2"}},
        lambda last: {"h": last[1], "c": last[2]} if last else {"h": zeros(2, 1, 5), "c": zeros(2, 1, 5)},
    ),
    "tuple": (
        Joined,
        {"obs": OBS, "hc": (zeros(2, 6, 5), zeros(2, 6, 5)), "done": torch.tensor([0.0, 0, 1, 0, 0, 1])},
        {"state": {"hc": "y1"}},
        lambda last: {"hc": last[1] if last else (zeros(2, 1, 5), zeros(2, 1, 5))},
    ),
    "dict": (
        Swapped,
        {"obs": OBS, "state": {"h": zeros(6, 5), "c": torch.ones(6, 5)}, "goal": GOAL},
        {"state": {"state": "state"}, "static": ["goal"]},
        lambda last: {"state": last["state"] if last else {"h": zeros(1, 5), "c": torch.ones(1, 5)}},
    ),
    "rows first": (
        RowsFirst,
        {"obs": OBS, "h": zeros(6, 2, 5), "c": zeros(6, 2, 5)},
        {"state": {"h": "y2", "c": "y3"}},
        lambda last: {"h": last[2], "c": last[3]} if last else {"h": zeros(1, 2, 5), "c": zeros(1, 2, 5)},
    ),
    "difference": (Difference, {"obs": OBS[:1]}, {}, lambda last: {}),
    "one client": (OneClient, {"obs": OBS[:1]}, {}, lambda last: {}),
    "kept": (Hidden, {"obs": OBS}, {}, lambda last: {}),
    "in place": (
        InPlace,
        {"obs": OBS, "h": zeros(6, 5)},
        {"state": {"h": "y1"}},
        lambda last: {"h": last[1].clone() if last else zeros(1, 5)},
    ),
    "mirrored": (
        Mirrored,
        {"obs": OBS, "h": zeros(6, 5), "c": zeros(6, 5)},
        {"state": {"h": "y1", "c": "y2"}},
        lambda last: {"h": last[1], "c": last[2]} if last else {"h": zeros(1, 5), "c": zeros(1, 5)},
    ),
    "optional": (
        Optional,
        {"obs": OBS, "steps": torch.zeros(6, dtype=torch.int64)},
        {"state": {"hx": "y2", "steps": "y1"}},
        lambda last: {"steps": last[1], "hx": last[2]} if last else {"steps": torch.zeros(1, dtype=torch.int64)},
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"rows first", "difference", "mirrored"}))
def test_bundle_equals_repeated_calls_of_the_module(name: str, repository: Path) -> None:
    made, example, options, _ = CASES[name]
    module = made().eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    report = unroll.export(module, example, name=made.__name__.lower(), repository=repository, step=True, **options)
    assert report.manifest.streamable
    assert all(
        torch.equal(value, before[key]) for key, value in module.state_dict().items()
    )  # export leaves the buffers as they were
    check(name, module, repository)


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("in place", ["--input", "obs:float32:3", "--state", "h:float32:5=y1"]),
        pytest.param(
            "layer first",
            [
                *("--input", "obs:float32:3", "--input", "done:float32:"),
                *("--state", "h:float32:2xBx5=y1", "--state", "c:float32:2xBx5=y2"),
            ],
            marks=pytest.mark.long,
        ),
        pytest.param(
            "tuple",
            ["--input", "obs:float32:3", "--input", "done:float32:", "--state", "hc:float32:2xBx5,2xBx5=y1"],
            marks=pytest.mark.long,
        ),
    ],
)
def test_command_exports_a_step_module(name: str, described: list[str], few_steps: None, tmp_path: Path) -> None:
    module = CASES[name][0]().eval()
    made = type(module).__name__
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    model = [f"{__file__}:{made}", "--weights", f"{tmp_path}/weights.pt", "--repository", str(tmp_path)]
    assert cli.main(["export", *model, "--name", made.lower(), "--step", *described]) == 0
    check(name, module, tmp_path)


def test_a_described_state_is_a_tensor_or_a_tuple_of_them() -> None:
    described = [StateSpec.parse(f"{name}=y1") for name in ("one:int64:", "two:float32:2xBx5,Bx7", "none")]
    made = step_examples([InputSpec.parse("x:float32:3")], state=described)
    assert {*made} == {"x", "one", "two"}
    assert made["one"].dtype == torch.int64
    assert [one.shape for one in (made["one"], *made["two"])] == [(32,), (2, 32, 5), (32, 7)]


@pytest.mark.long
@pytest.mark.parametrize("name", ["rows first", "difference", "mirrored"])
def test_carried_state_may_be_transposed_an_input_one_row_or_mirrored(
    name: str, few_steps: None, tmp_path: Path
) -> None:
    made, example, options, _ = CASES[name]
    module = made().eval()
    unroll.export(module, example, name=made.__name__.lower(), repository=tmp_path, step=True, **options)
    check(name, module, tmp_path)


def check(name: str, module: nn.Module, repository: Path) -> None:
    """Compare the bundle over 300 steps with `module`, which gets its own results as states."""
    oracle, following = Oracle(repository, type(module).__name__.lower()), CASES[name][-1]
    inputs = {spec.name: torch.randn(300, *spec.shape) for spec in oracle.manifest.inputs}
    if "done" in inputs:
        inputs["done"] = (torch.rand(300) < 0.1).float()
    row, fixed = oracle.manifest.blank_row(), {}
    for spec in oracle.manifest.static:
        fixed[spec.name] = torch.randn(1, *spec.shape)
        row[spec.offset : spec.offset + spec.size] = fixed[spec.name].flatten()
    found, _ = oracle.all(*(value.numpy() for value in inputs.values()), state=row)

    last, answers = None, []
    with torch.no_grad():
        for step in range(300):
            now = {key: value[step : step + 1] for key, value in inputs.items()}
            last = module(**now, **fixed, **following(last))
            answers.append(last)
    for index, spec in enumerate(oracle.manifest.outputs):
        key = spec.name if name == "dict" else index
        steps = [one if isinstance(one, Tensor) else one[key] for one in answers]
        np.testing.assert_allclose(found[index], torch.cat(steps).numpy(), atol=1e-5)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.calls = nn.GRUCell(3, 5), 0

    def forward(self, obs: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        h = self.cell(obs, h)
        return h.sum(-1), h * (self.calls % 50 > 0)


class Normalising(nn.Module):
    """Keeps a running mean over all clients."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 5)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, obs: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self.mean += 0.1 * (obs.mean(0) - self.mean)
        h = self.cell(obs - self.mean, h)
        return h.sum(-1), h


class Learned(nn.Module):
    """Has an initial state that does not fit into a row of the bundle."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.begin, self.h = nn.GRUCell(3, 5), nn.Parameter(torch.randn(5)), None

    def forward(self, obs: Tensor) -> Tensor:
        self.h = self.cell(obs, self.begin.expand(len(obs), -1) if self.h is None else self.h)
        return self.h.sum(-1)


class Locked(nn.Module):
    """Holds a lock, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.lock = nn.GRUCell(3, 5), threading.Lock()

    def forward(self, obs: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        with self.lock:
            h = self.cell(obs, h)
        return h.sum(-1), h


class FirstStep(nn.Module):
    """Carries a running maximum and counts its steps to weight them."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.steps = nn.Linear(3, 2), 0

    def forward(self, obs: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self.steps += 1
        return self.head(obs * 0.9**self.steps), torch.maximum(obs, h)


class Several(nn.Module):
    """Needs at least two clients."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 5)

    def forward(self, obs: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(obs, h)
        return h.sum(-1) + obs[1, 0], h


class OnlyState(nn.Module):
    """Returns no value per client."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(3, 5)

    def forward(self, obs: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.cell(obs, (h, c))


REFUSED: list[tuple[type[nn.Module], Arguments, Arguments, str, str]] = [
    (Counting, {"obs": OBS, "h": zeros(6, 5)}, {"state": {"h": "y1"}}, "keeps_state", "calls"),
    (Normalising, {"obs": OBS, "h": zeros(6, 5)}, {"state": {"h": "y1"}}, "keeps_state", "'mean'"),
    (Learned, {"obs": OBS}, {}, "keeps_state", "start from zeros"),
    (Counting, {"obs": OBS, "h": zeros(6, 5)}, {"state": {"h": "y0"}}, "input", "'y0'"),
    (Policy, {"obs": OBS, "h": zeros(2, 4, 5), "c": zeros(2, 6, 5), "done": OBS[:, 0]}, {"state": {}}, "input", "obs"),
    (Optional, {"obs": OBS, "steps": OBS[:, 0]}, {"state": {}}, "input", "has no state"),
    (Locked, {"obs": OBS, "h": zeros(6, 5)}, {"state": {"h": "y1"}}, "not_copyable", "'lock', a lock"),
    (FirstStep, {"obs": OBS, "h": zeros(6, 3)}, {"state": {"h": "y1"}}, "keeps_state", "steps"),
    (Several, {"obs": OBS, "h": zeros(6, 5)}, {"state": {"h": "y1"}}, "forward_failed", "IndexError"),
    (
        OnlyState,
        {"obs": OBS, "h": zeros(6, 5), "c": zeros(6, 5)},
        {"state": {"h": "y0", "c": "y1"}},
        "output",
        "only its states",
    ),
    (Hidden, {"obs": OBS}, {"batch_first": False}, "input", "no time"),
]


@pytest.mark.parametrize(("made", "example", "options", "code", "says"), REFUSED)
def test_unsupported_step_modules_are_refused(
    made: type[nn.Module], example: Arguments, options: Arguments, code: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=says) as refusal:
        unroll.export(made(), example, name="refused", repository=tmp_path, step=True, **options)
    assert refusal.value.code == code
    assert "StepForm" not in str(refusal.value)
    assert not [*tmp_path.iterdir()]
