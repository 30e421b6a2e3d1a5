"""The models that tests serve: one for every code path of the server. Their bundles are files, as in production."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import unroll
from conformance.kinds import TESTED, Kind
from unroll.models.stacked_rnn import StackedRNN, StackedRNNConfig

BUNDLES = Path(__file__).parent / "bundles"


class Model(NamedTuple):
    """A module, its example inputs, and its export options."""

    module: nn.Module
    example: dict[str, Tensor]
    options: Mapping[str, Any] = MappingProxyType({})


class Recurrent(nn.Module):
    """A stack of LSTM or GRU layers and a head for every step, or for the last."""

    def __init__(self, kind: type[nn.RNNBase], features: int = 3, *, last: bool = False, **options: object) -> None:
        super().__init__()
        self.rnn = kind(features, 8, batch_first=True, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 2)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head(y[:, -1] if self.last else y)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.rnn = nn.GRU(4, 8, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, token: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(token))[0])


class TwoInTwoOut(nn.Module):
    """Two inputs, two outputs, and a learned initial state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 6))
        self.level, self.slope = nn.Linear(6, 1), nn.Linear(6, 2)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        start = self.start.expand(1, a.shape[0], 6).contiguous()
        y, _ = self.rnn(torch.cat([a, b], -1), start)
        return {"level": self.level(y), "slope": self.slope(y)}


class Hot(nn.Module):
    """Answers huge inputs with infinity, as float32 models may."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0]) + 100 * x[..., :2]


class Voices(nn.Module):
    """Static inputs in addition to the frames: a speaker, and a gain for each of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.rnn = nn.GRU(3 + 4 + 2, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, speaker: Tensor, gain: Tensor) -> Tensor:
        fixed = torch.cat([self.embedding(speaker), gain], -1)[:, None].expand(-1, x.shape[1], -1)
        return self.head(self.rnn(torch.cat([x, fixed], -1))[0])


class Mixed(nn.Module):
    """State of every kind: the previous step, a position, a given cache, and a computed initial state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)
        self.start = nn.Linear(2, 5)
        self.rnn = nn.GRU(4, 5, batch_first=True)
        self.top = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x: Tensor, known: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        x = x - torch.cat([x[:, :1], x[:, :-1]], 1) + 0.1 * torch.arange(x.shape[1])[:, None]
        joined = torch.cat([cache, x], 1)
        y = self.conv(joined.transpose(1, 2)).transpose(1, 2)
        return self.top(self.rnn(y, self.start(known)[None])[0])[0], joined[:, -2:]


class Tables(nn.Module):
    """A loop that reads tables in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.others, self.months = nn.Embedding(9, 6), nn.Embedding(5, 6), nn.Embedding(12, 6)
        self.kinds, self.update = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, token: Tensor, kind: Tensor, any: Tensor, pair: Tensor, month: Tensor) -> Tensor:
        h, outs = torch.zeros(token.shape[0], 6), []
        for t in range(token.shape[1]):
            step = self.tokens(token[:, t].int().reshape(-1, 1)).squeeze(1)
            step = step + self.kinds(functional.one_hot(kind[:, t], 4).float())
            step = step + self.tokens(any[:, t].clamp(0, 8)) + self.months(month[:, t] - 1)
            step = step + self.tokens(pair[:, t, 0]) + self.others(pair[:, t, 1])
            h = torch.tanh(step + self.update(h) * h)
            outs.append(h)
        return torch.stack(outs, 1)


class Stack(nn.Module):
    """Layers as wide as their inputs."""

    def __init__(self, kind: type[nn.RNNBase], layers: int) -> None:
        super().__init__()
        self.rnn = kind(16, 16, layers, batch_first=True)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Residual(nn.Module):
    """Two kinds of layers, with other nodes in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(5, 12, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.second = nn.GRU(12, 12, batch_first=True)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, _ = self.first(x)
        two, _ = self.second(self.norm(one) * 3)
        return self.head(torch.cat([torch.relu(one), two], -1)) + x[..., :3]


class Bare(nn.Module):
    """A single layer whose width is no multiple of a kernel tile."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 37, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class StateUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, (_, c) = self.rnn(x)
        return self.head(c[0])


class Gaps(nn.Module):
    """Replaces a missing value by the last known one, which decays."""

    def __init__(self) -> None:
        super().__init__()
        self.fade, self.cell, self.head = nn.Parameter(torch.rand(3)), nn.GRUCell(7, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        h, last, answers = x.new_zeros(x.shape[0], 6), x.new_zeros(x.shape[0], 3), []
        for t in range(x.shape[1]):
            is_missing = torch.isnan(x[:, t])
            last = torch.where(is_missing, self.fade * last, x[:, t])
            h = self.cell(torch.cat([last, is_missing.float(), known[:, t]], 1), h)
            answers.append(self.head(h))
        return torch.stack(answers, 1)


def tiny() -> Model:
    """Return the model of `unroll doctor`, with this seed's weights."""
    config = StackedRNNConfig(cell="lstm", hidden_size=4, layers=2, input_size=2, output_size=1)
    return Model(StackedRNN(config).eval(), {"x": torch.randn(2, 4, 2)})


def _stack(kind: type[nn.RNNBase], layers: int) -> Model:
    return Model(Stack(kind, layers), _x(16))


def _model_of(kind: Kind) -> Model:
    return Model(kind.build(), kind.example(), kind.options)


def _tables() -> dict[str, Tensor]:
    limits = {"token": (0, 9), "kind": (0, 4), "any": (0, 9), "pair": (0, 5), "month": (1, 13)}
    return {name: torch.randint(*limit, (3, 8, 2) if name == "pair" else (3, 8)) for name, limit in limits.items()}


def _x(features: int = 3) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 9, features)}


#: Models by the folder of their bundle.
MODELS: dict[str, Callable[[], Model]] = {
    "lstm/1": lambda: Model(Recurrent(nn.LSTM, num_layers=2), _x()),
    "gru/1": lambda: Model(Recurrent(nn.GRU, num_layers=2), _x()),
    "gru/2": lambda: Model(Recurrent(nn.GRU, num_layers=2), _x()),
    "last/1": lambda: Model(Recurrent(nn.LSTM, last=True), _x()),
    "whole/1": lambda: Model(Recurrent(nn.GRU, bidirectional=True), _x()),
    "tokens/1": lambda: Model(Tokens(), {"token": torch.randint(0, 11, (2, 9))}),
    "two/1": lambda: Model(TwoInTwoOut(), {"a": torch.randn(2, 9, 2), "b": torch.randn(2, 9, 3)}),
    "hot/1": lambda: Model(Hot(), _x()),
    "voices/1": lambda: Model(
        Voices(), _x() | {"speaker": torch.tensor([1, 5]), "gain": torch.randn(2, 2)}, {"static": ["speaker", "gain"]}
    ),
    "mixed/1": lambda: Model(
        Mixed(),
        _x() | {"known": torch.randn(2, 2), "cache": torch.zeros(2, 2, 3)},
        {"static": ["known"], "state": {"cache": "y1"}},
    ),
    "gaps/1": lambda: Model(Gaps(), _x() | {"known": torch.randn(2, 9, 1)}, {"allow_nan": ["x"]}),
    "tiny/2": tiny,
    "tables/1": lambda: Model(Tables(), _tables()),
    "bare/1": lambda: Model(Bare(), _x(4)),
    "residual/1": lambda: Model(Residual(), _x(5)),
    "stateused/1": lambda: Model(StateUsed(), _x(4)),
    **{f"lstm-{layers}/1": partial(_stack, nn.LSTM, layers) for layers in (1, 2, 4)},
    **{f"gru-{layers}/1": partial(_stack, nn.GRU, layers) for layers in (1, 2, 4)},
    # Kinds that onnxruntime-gpu runs in a special way.
    **{
        f"{kind.name.replace(',', '').replace(' ', '-')}/1": partial(_model_of, kind)
        for kind in TESTED
        if kind.name
        in ("matrices as steps", "rnn tanh", "rnn relu", "embedding, LSTM, norm, GRU", "several outputs in a dict")
    },
}


def build(folder: str) -> Model:
    """Build the model of the bundle, with the same weights each time."""
    torch.manual_seed(sum(folder.encode()))
    model = MODELS[folder]()
    model.module.eval()
    return model


def link(repository: Path, *names: str) -> Path:
    """Link the bundles of these names into the repository; return it."""
    for name in names:
        (repository / name).symlink_to(BUNDLES / name)
    return repository


def export(folder: str, repository: Path) -> None:
    module, example, options = build(folder)
    name, _, version = folder.partition("/")
    unroll.export(module, example, name=name, version=version, repository=repository, **options)
