"""The model that is served: an LSTM of 2 layers of 64 and a linear head, 16 values in and 16 out, random weights.

Run as `python -m bench.model REPOSITORY`; a process of its own, so that the one that measures never loads PyTorch.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import export
from bench.subjects import FEATURES, MODEL

LAYERS, HIDDEN = 2, 64


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(FEATURES, HIDDEN, LAYERS, batch_first=True)
        self.head = nn.Linear(HIDDEN, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def write(repository: Path) -> None:
    torch.manual_seed(0)
    export.export(Model().eval(), {"x": torch.randn(2, 9, FEATURES)}, name=MODEL, repository=repository)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
