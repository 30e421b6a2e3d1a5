"""Keyword spotting among twelve words: causal convolutions, then GRU layers.

A step is one frame of 40 mel bands, every 10 ms.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

_BANDS, _WORDS = 40, 12


class Causal(nn.Module):
    """A depthwise convolution over the last `kernel` frames, followed by one across channels."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.before = kernel - 1
        self.depthwise = nn.Conv1d(channels, channels, kernel, groups=channels)
        self.across = nn.Conv1d(channels, channels, 1)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, frames: Tensor) -> Tensor:
        x = functional.pad(frames.transpose(1, 2), (self.before, 0))
        return frames + self.norm(self.across(self.depthwise(x))).relu().transpose(1, 2)


class Keywords(nn.Module):
    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(Causal(_BANDS, 5), Causal(_BANDS, 5))
        self.rnn = nn.GRU(_BANDS, hidden, 2, batch_first=True)
        self.head = nn.Linear(hidden, _WORDS)

    def forward(self, mel: Tensor) -> Tensor:
        """(batch, time, 40) -> word scores so far, (batch, time, 12)."""
        return self.head(self.rnn(self.convolutions(mel))[0])


def build() -> Keywords:
    torch.manual_seed(0)
    return Keywords().eval()


def example() -> dict[str, Tensor]:
    return {"mel": torch.randn(2, 24, _BANDS)}
