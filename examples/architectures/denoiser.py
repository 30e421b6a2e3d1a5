"""Speech denoising frame by frame, with the architecture of DTLN.

A step is a frame of 512 samples; the client overlap-adds the outputs. The first half of the model masks the spectrum,
the second half a learned representation. Two LSTM layers compute each mask.
"""

import torch
from torch import Tensor, nn

from unroll.examples.architectures.spectrum import Spectrum, magnitude

_FRAME = 512


class Mask(nn.Module):
    """The share of speech in each feature, from 0 to 1."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(features, hidden, 2, batch_first=True, dropout=0.25)
        self.head = nn.Linear(hidden, features)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.rnn(features)[0]).sigmoid()


class Denoiser(nn.Module):
    def __init__(self, hidden: int = 128, basis: int = 256) -> None:
        super().__init__()
        self.spectrum = Spectrum(_FRAME)
        self.first = Mask(_FRAME // 2 + 1, hidden)
        self.encode = nn.Linear(_FRAME, basis, bias=False)
        self.norm = nn.LayerNorm(basis, eps=1e-7)
        self.second = Mask(basis, hidden)
        self.decode = nn.Linear(basis, _FRAME, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """(batch, time, 512) -> the same frames, with less noise."""
        real, imaginary = self.spectrum.split(frames)
        mask = self.first(magnitude(real, imaginary))
        encoded = self.encode(self.spectrum.join(mask * real, mask * imaginary))
        return self.decode(self.second(self.norm(encoded)) * encoded)


def build() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser().eval()


def example() -> dict[str, Tensor]:
    return {"frames": torch.randn(2, 16, _FRAME) * 0.1}
