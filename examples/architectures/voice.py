"""Voice activity detection in chunks of 32 ms, with the architecture of Silero VAD.

A step holds 512 samples at 16 kHz and the 64 before them. Convolutions reduce the spectra of a step to one vector; an
LSTM runs over the steps.
"""

import torch
from torch import Tensor, nn

from unroll.examples.architectures.spectrum import Spectrum, magnitude

_FRAME, _HOP = 256, 128


class Voice(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.spectrum = Spectrum(_FRAME)
        channels, strides = (_FRAME // 2 + 1, width, width // 2, width // 2, width), (1, 2, 2, 1)
        self.encoder = nn.Sequential()
        for before, after, stride in zip(channels, channels[1:], strides, strict=False):
            self.encoder.extend([nn.Conv1d(before, after, 3, stride, padding=1), nn.ReLU()])
        self.rnn = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, samples: Tensor) -> Tensor:
        """(batch, time, 576) -> probability of speech, (batch, time)."""
        batch, time = samples.shape[:2]
        frames = samples.flatten(0, 1).unfold(-1, _FRAME, _HOP)
        bins = magnitude(*self.spectrum.split(frames)).transpose(1, 2)
        seen = self.encoder(bins).mean(-1).unflatten(0, (batch, time))
        return self.head(self.rnn(seen)[0].relu()).squeeze(-1).sigmoid()


def build() -> Voice:
    torch.manual_seed(0)
    return Voice().eval()


def example() -> dict[str, Tensor]:
    return {"samples": torch.randn(2, 16, 576) * 0.1}
