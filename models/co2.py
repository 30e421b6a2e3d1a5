"""A forecaster of atmospheric CO₂: predicts the next week from all weeks so far, in ppm.

Trained by `python -m unroll.models.training.co2` on the measurements of `unroll.models.mauna_loa`.
"""

from pathlib import Path

import torch
from torch import nn

from unroll.models import checkpoint
from unroll.models.stacked_rnn import StackedRNN, StackedRNNConfig

CHECKPOINT = Path(__file__).parent / "checkpoints" / "co2"

CONFIG = StackedRNNConfig(cell="gru", input_size=1, hidden_size=16, layers=2, output_size=1)


class CO2Forecaster(nn.Module):
    """Forecasts the change over the coming week and adds it to this week's value.

    Takes ppm (batch, time, 1) float32, one value per week, and returns forecasts for the following weeks in the same
    shape. Normalisation is part of the model.

    Attributes:
        level, spread: mean and standard deviation of the input, in ppm.
        change: standard deviation of a weekly change, in ppm.
    """

    level: torch.Tensor
    spread: torch.Tensor
    change: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rnn = StackedRNN(CONFIG)
        for name in ("level", "spread", "change"):
            self.register_buffer(name, torch.ones(()))

    def forward(self, ppm: torch.Tensor) -> torch.Tensor:
        return ppm + self.change * self.rnn((ppm - self.level) / self.spread)


def load(stem: Path = CHECKPOINT) -> CO2Forecaster:
    """Load the trained forecaster.

    Raises:
        CheckpointError: if the checkpoint cannot be read or has another configuration.
    """
    return checkpoint.read(stem, CO2Forecaster(), CONFIG)
