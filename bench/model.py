"""Exports the models with random weights, and writes PyTorch's outputs for the first inputs.

Run as `python -m bench.model REPOSITORY [large]`, in its own process, so that the load generator never loads PyTorch.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import unroll
from bench import inputs


class Model(nn.Module):
    def __init__(self, shape: inputs.Shape) -> None:
        super().__init__()
        self.rnn = getattr(nn, shape.cell)(shape.features, shape.hidden, shape.layers, batch_first=True)
        self.head = nn.Linear(shape.hidden, shape.features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def write(repository: Path, models: Mapping[str, inputs.Shape]) -> None:
    """Write each model's bundle, and NAME-torch.npz with PyTorch's outputs for `rows` and, by length, `sequences`."""
    for name, shape in models.items():
        torch.manual_seed(0)
        model = Model(shape).eval()
        unroll.export(model, {"x": torch.randn(2, 9, shape.features)}, name=name, repository=repository)
        inputs_by_key = {"rows": inputs.rows(shape.features)[: inputs.TORCH_SESSIONS]}
        inputs_by_key |= {str(length): inputs.sequences(shape.features, length) for length in inputs.TORCH_LENGTHS}
        with torch.inference_mode():
            outputs = {key: model(torch.from_numpy(x)).numpy() for key, x in inputs_by_key.items()}
        np.savez(repository.parent / f"{name}-torch.npz", **outputs)


if __name__ == "__main__":
    write(Path(sys.argv[1]), inputs.LARGE if sys.argv[2:] == ["large"] else inputs.MODELS)
