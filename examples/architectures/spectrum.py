"""A Fourier transform as two matrices, since every runtime with recurrent layers has matrix products."""

import math

import torch
from torch import Tensor, nn


class Spectrum(nn.Module):
    """Transforms frames of `size` samples into `size // 2 + 1` complex bins, and back."""

    def __init__(self, size: int) -> None:
        super().__init__()
        bins = size // 2 + 1
        angle = 2 * math.pi * torch.outer(torch.arange(size), torch.arange(bins)).double() / size
        # Every bin except the first and the last also stands for its mirror image.
        weight = torch.full((bins, 1), 2.0 / size, dtype=torch.float64)
        weight[[0, -1]] /= 2
        self.forth = nn.Buffer(torch.cat([angle.cos(), -angle.sin()], 1).float())
        self.back = nn.Buffer(torch.cat([weight * angle.T.cos(), -weight * angle.T.sin()]).float())

    def split(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(..., size) -> real and imaginary parts, each (..., bins)."""
        real, imaginary = (frames @ self.forth).chunk(2, -1)
        return real, imaginary

    def join(self, real: Tensor, imaginary: Tensor) -> Tensor:
        """Real and imaginary parts, each (..., bins) -> (..., size)."""
        return torch.cat([real, imaginary], -1) @ self.back


def magnitude(real: Tensor, imaginary: Tensor) -> Tensor:
    return (real.square() + imaginary.square() + 1e-9).sqrt()
