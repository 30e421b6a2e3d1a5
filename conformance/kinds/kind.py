"""A kind of module, and parts shared by many kinds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]


class Parts(nn.Module):
    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def made(forward: Forward, **parts: Any) -> nn.Module:
    """A module of the given parts, with `forward(self, ...)` as its own."""
    return type("Made", (Parts,), {"forward": forward})(**parts)


@dataclass(frozen=True)
class Kind:
    name: str
    build: Callable[[], nn.Module]
    #: Example inputs; by default floats of (2, 7, 4).
    example: Callable[[], dict[str, Any]] = lambda: {"x": torch.randn(2, 7, 4)}
    options: dict[str, Any] = field(default_factory=dict)
    #: The code of its refusal, or None.
    refused: str | None = None
    #: Text that the refusal, or the reason for not streaming, must contain.
    says: str = ""
    streams: bool = True
    ragged: bool = True
    bit_exact: bool = True
    outputs: tuple[str, ...] = ("y",)


def lstm(inputs: int = 4, hidden: int = 6, layers: int = 1, **options: Any) -> nn.LSTM:
    return nn.LSTM(inputs, hidden, layers, batch_first=True, **options)


def gru(inputs: int = 4, hidden: int = 6, layers: int = 1, **options: Any) -> nn.GRU:
    return nn.GRU(inputs, hidden, layers, batch_first=True, **options)


def rnn(inputs: int = 4, hidden: int = 6, layers: int = 1, **options: Any) -> nn.RNN:
    return nn.RNN(inputs, hidden, layers, batch_first=True, **options)


def per_step(s: Any, x: Tensor) -> Tensor:
    return s.head(s.rnn(x)[0])


def head(inputs: int = 6) -> nn.Linear:
    return nn.Linear(inputs, 3)
