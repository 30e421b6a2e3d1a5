"""Layers of toolkits for speech and sound."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from conformance.packages.entries.sequences import First, with_state
from conformance.packages.entries.steps import with_states
from conformance.packages.entry import bare, entry


@entry("asteroid", "StackedResidualRNN", "x:float32:8", alone=True)
def asteroid_residual() -> nn.Module:
    bare("asteroid", "asteroid.masknn")
    from asteroid.masknn.recurrent import StackedResidualRNN

    layers: nn.Module = StackedResidualRNN("GRU", 8, n_layers=3)
    return layers


@entry("asteroid", "DPRNNBlock, causal between chunks", "x:float32:8x6", alone=True, options=("--time-last",))
def asteroid_dprnn() -> nn.Module:
    bare("asteroid", "asteroid.masknn")
    from asteroid.masknn.recurrent import DPRNNBlock

    block: nn.Module = DPRNNBlock(8, 6, norm_type="cLN", bidirectional=False)
    return block


@entry("denoiser", "Demucs, causal, which starts with the sound it needs", "mix:float32:16", alone=True)
def denoiser_demucs() -> nn.Module:
    from denoiser.demucs import Demucs

    class Frames(nn.Module):
        """Its answer comes 20 samples late: as far as two layers look ahead."""

        def __init__(self) -> None:
            super().__init__()
            self.demucs = Demucs(hidden=4, depth=2, resample=1, normalize=False)
            self.demucs.valid_length = lambda length: length  # it is one, and an int() of it would hold for it alone

        def forward(self, mix: Tensor) -> Tensor:
            sound = mix.flatten(1)
            y: Tensor = self.demucs(functional.pad(sound, (20, 0)))
            return y[..., : sound.shape[1]].reshape(mix.shape)

    return Frames()


@entry("deepfilternet", "GroupedGRU, 2 layers", "x:float32:16", own=with_state, alone=True)
def df_grouped() -> nn.Module:
    bare("df")
    from df.modules import GroupedGRU

    return First(GroupedGRU(16, 16, num_layers=2, groups=2, add_outputs=True))


@entry("deepfilternet", "SqueezedGRU_S", "x:float32:16", own=with_state, alone=True)
def df_squeezed() -> nn.Module:
    bare("df")
    from df.modules import SqueezedGRU_S

    return First(SqueezedGRU_S(16, 16, 8, num_layers=2, gru_skip_op=nn.Identity))


@entry("resemblyzer", "VoiceEncoder", "mels:float32:40", trained=True, alone=True)
def voice_encoder() -> nn.Module:
    bare("resemblyzer")
    from resemblyzer.voice_encoder import VoiceEncoder

    encoder: nn.Module = VoiceEncoder("cpu", verbose=False)
    return encoder


def _speechbrain(name: str, **more: Any) -> nn.Module:
    from speechbrain.nnet import RNN

    return First(getattr(RNN, name)(8, input_shape=(None, None, 4), num_layers=2, **more))


@entry("speechbrain", "LSTM, 2 layers", "x:float32:4", own=with_state, alone=True)
def speechbrain_lstm() -> nn.Module:
    return _speechbrain("LSTM")


@entry("speechbrain", "LiGRU, 2 layers", "x:float32:4", alone=True)
def speechbrain_ligru() -> nn.Module:
    return _speechbrain("LiGRU")


@entry("speechbrain", "QuasiRNN, 2 layers, from zeros", "x:float32:4", alone=True)
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


@entry("espnet", "RNNEncoder, an LSTM without subsampling", "x:float32:8", alone=True)
def espnet_encoder() -> nn.Module:
    from espnet2.asr.encoder.rnn_encoder import RNNEncoder

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = RNNEncoder(
                8, bidirectional=False, num_layers=2, hidden_size=6, output_size=5, subsample=None
            )

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.encoder(x, torch.full((x.shape[0],), x.shape[1]))[0]
            return y

    return Encoder()


@entry("torchaudio", "the predictor of an RNN transducer", "x:int64:", alone=True)
def rnnt_predictor() -> nn.Module:
    bare("torchaudio", "torchaudio.models")
    _emformer()
    from torchaudio.models.rnnt import _Predictor

    class Predictor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.predictor = _Predictor(20, 5, 8, 2, 6, True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.predictor(x, torch.full((x.shape[0],), x.shape[1]))[0]
            return y

    return Predictor()


def _emformer() -> Any:
    import sys

    from torchaudio.models.emformer import Emformer

    sys.modules["torchaudio.models"].Emformer = Emformer
    return Emformer
