"""Layers from toolkits for speech and sound."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from conformance.packages.entries.sequences import First, TimeFirst, with_state
from conformance.packages.entry import bare, entry

_ASTEROID = "asteroid-filterbanks", "tqdm"


@entry("asteroid", "DPRNNBlock, causal between chunks", "x:float32:8x6", alone=True, needs=_ASTEROID)
def asteroid_dprnn() -> nn.Module:
    bare("asteroid", "asteroid.masknn")
    from asteroid.masknn.recurrent import DPRNNBlock

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = DPRNNBlock(8, 6, norm_type="cLN", bidirectional=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block(x.movedim(1, 3))
            return y.movedim(3, 1)

    return Block()


@entry(
    "denoiser", "Demucs, causal, which starts with the sound it needs", "mix:float32:16", alone=True, needs=("tqdm",)
)
def denoiser_demucs() -> nn.Module:
    from denoiser.demucs import Demucs

    class Frames(nn.Module):
        """Delay the answer by 20 samples, the look-ahead of two layers."""

        def __init__(self) -> None:
            super().__init__()
            self.demucs = Demucs(hidden=4, depth=2, resample=1, normalize=False)
            self.demucs.valid_length = lambda length: length  # already valid; an int() would fix the length

        def forward(self, mix: Tensor) -> Tensor:
            sound = mix.flatten(1)
            y: Tensor = self.demucs(functional.pad(sound, (20, 0)))
            return y[..., : sound.shape[1]].reshape(mix.shape)

    return Frames()


@entry(
    "deepfilternet",
    "GroupedGRU, 2 layers",
    "x:float32:16",
    own=with_state,
    alone=True,
    needs=("deepfilterlib", "loguru"),
)
def df_grouped() -> nn.Module:
    bare("df")
    from df.modules import GroupedGRU

    return First(GroupedGRU(16, 16, num_layers=2, groups=2, add_outputs=True))


@entry("speechbrain", "LiGRU, 2 layers", "x:float32:4")
def speechbrain_ligru() -> nn.Module:
    from speechbrain.nnet.RNN import LiGRU

    return First(LiGRU(8, (None, None, 4), num_layers=2))


@entry("speechbrain", "QuasiRNN, 2 layers, from zeros", "x:float32:4")
def speechbrain_qrnn() -> nn.Module:
    from speechbrain.nnet.RNN import QuasiRNN

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = QuasiRNN(8, input_size=4, num_layers=2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers(x, x.new_zeros(2, x.shape[0], 8))[0]
            return y

    return Layers()


@entry("pytorch-cqrn", "CQRN, 2 layers, for frames of 5 bands", "x:float32:1x5", alone=True)
def cqrn() -> nn.Module:
    from torchcqrn import CQRN

    return TimeFirst(CQRN(1, 4, 2, window=2, kernel_size=[2, 3]))


def _wavenet_steps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    x = inputs["x"]
    return model.network.incremental_forward(
        torch.zeros(1, 1, 12), test_inputs=x, T=x.shape[1], softmax=False, quantize=False
    )[0].t()


@entry("wavenet-vocoder", "WaveNet, 4 layers", "x:float32:12", own=_wavenet_steps, alone=True)
def wavenet() -> nn.Module:
    from wavenet_vocoder import WaveNet

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"residual_channels": 8, "gate_channels": 8, "skip_out_channels": 8}
            self.network = WaveNet(out_channels=12, layers=4, stacks=2, weight_normalization=False, **sizes)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.network(x.transpose(1, 2))
            return y.transpose(1, 2)

    return Network()
