"""The measured models, and a lower bound of a step's time for each."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import unroll

FEATURES = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """`layers` of `hidden`, and a linear head; FEATURES values in and as many out."""

    cell: str
    layers: int
    hidden: int

    @property
    def name(self) -> str:
        return f"{self.cell.lower()}-{self.layers}x{self.hidden}"

    @property
    def title(self) -> str:
        return f"{self.cell} {self.layers}×{self.hidden}"

    @property
    def weights(self) -> int:
        """Number of matrix elements. A step reads each once and multiplies it with every row."""
        gates = {"LSTM": 4, "GRU": 3}[self.cell]
        inputs = FEATURES + (self.layers - 1) * self.hidden
        return gates * self.hidden * (inputs + self.layers * self.hidden) + self.hidden * FEATURES

    def floor(self, rows: int, bytes_per_second: float, operations_per_second: float) -> float:
        """Lower bound in seconds: read the weights once, or compute the products of all rows."""
        return max(4 * self.weights / bytes_per_second, 2 * rows * self.weights / operations_per_second)


class Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.rnn = getattr(nn, shape.cell)(FEATURES, shape.hidden, shape.layers, batch_first=True)
        self.head = nn.Linear(shape.hidden, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def model(shape: Shape) -> Model:
    torch.manual_seed(0)
    return Model(shape).eval()


def bundle_of(shape: Shape, repository: Path) -> Path:
    """The model's bundle with random weights, exported at first use."""
    path = repository / shape.name / "1"
    if not path.exists():
        unroll.export(model(shape), {"x": torch.randn(2, 9, FEATURES)}, name=shape.name, repository=repository)
    return path
