"""A detector of whistles, double claps and hums: takes frames of samples, returns three probabilities per frame.

Trained by `python -m unroll.models.training.sound` on synthesised sound only.
"""

import math
from pathlib import Path

import torch
from torch import nn

from unroll.models import checkpoint
from unroll.models.stacked_rnn import StackedRNN, StackedRNNConfig
from unroll.models.synthesis import EVENTS as EVENTS
from unroll.models.synthesis import FRAME, RATE

CHECKPOINT = Path(__file__).parent / "checkpoints" / "sound"

#: The number of frequency bands, and their lowest and highest centre in Hz: from a low voice to a high whistle.
BANDS, LOWEST, HIGHEST = 24, 90.0, 3700.0

CONFIG = StackedRNNConfig(cell="gru", input_size=BANDS, hidden_size=24, layers=2, output_size=len(EVENTS))


class SoundDetector(nn.Module):
    """Log energies of each frame in 24 bands, followed by two GRU layers.

    Takes samples (batch, time, 256) float32 in -1 … 1, and returns the probability of each event, (batch, time, 3). The
    model computes the bands, so a client can send raw samples from a microphone.
    """

    bank: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rnn = StackedRNN(CONFIG)
        self.register_buffer("bank", _bank(), persistent=False)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        cosine, sine = (samples @ self.bank).chunk(2, dim=-1)
        # The floor is far above rounding errors, which would otherwise dominate in silence.
        energies = torch.log(cosine.square() + sine.square() + 1e-7)
        return torch.sigmoid(self.rnn((energies + 12) / 4))


def _bank() -> torch.Tensor:
    """A windowed cosine and sine for each band, (256, 2 * 24)."""
    centres = LOWEST * (HIGHEST / LOWEST) ** torch.linspace(0, 1, BANDS, dtype=torch.float64)
    angles = 2 * math.pi * torch.arange(FRAME, dtype=torch.float64)[:, None] * centres / RATE
    window = torch.hann_window(FRAME, dtype=torch.float64)[:, None] * 2 / FRAME
    return torch.cat([window * angles.cos(), window * angles.sin()], dim=1).float()


def load(stem: Path = CHECKPOINT) -> SoundDetector:
    """Load the trained detector.

    Raises:
        CheckpointError: if the checkpoint cannot be read or has another configuration.
    """
    return checkpoint.read(stem, SoundDetector(), CONFIG)
