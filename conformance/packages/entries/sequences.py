"""Modules with a forward that takes a sequence."""

from typing import Any

import torch
from torch import Tensor, nn

from conformance.packages.entry import entry


class First(nn.Module):
    """Returns the first result of a module, called with `None` as its state."""

    def __init__(self, module: nn.Module, *more: Any) -> None:
        super().__init__()
        self.module, self._more = module, more

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(x, *self._more)[0]
        return result


class TimeFirst(First):
    """The same for a module that takes (time, batch, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(x.transpose(0, 1), *self._more)[0]
        return result.transpose(0, 1)


def with_state(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Call the package's module step by step, passing back the state that it returned."""
    state, outputs = None, []
    for step in inputs["x"].unbind(1):
        y, state = model.module(step.unsqueeze(1), state)
        outputs.append(y.squeeze(1))
    return torch.cat(outputs)


@entry("torchrl", "LSTM of cells, 2 layers", "x:float32:4", own=with_state)
def torchrl_lstm() -> nn.Module:
    from torchrl.modules import LSTM

    return First(LSTM(4, 8, num_layers=2, batch_first=True))


@entry("torchrl", "GRU of cells", "x:float32:4", own=with_state)
def torchrl_gru() -> nn.Module:
    from torchrl.modules import GRU

    return First(GRU(4, 8, batch_first=True))


@entry("ncps", "LTC", "x:float32:4", own=with_state)
def ncps_ltc() -> nn.Module:
    from ncps.torch import LTC
    from ncps.wirings import AutoNCP

    return First(LTC(4, AutoNCP(12, 3, seed=1), batch_first=True))


@entry("ncps", "CfC", "x:float32:4", own=with_state)
def ncps_cfc() -> nn.Module:
    from ncps.torch import CfC

    return First(CfC(4, 12, batch_first=True))


def _mamba_steps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    config = model.config
    cache = None, torch.zeros(1, config.d_inner, config.d_conv - 1)
    outputs = []
    for step in inputs["x"].unbind(1):
        y, cache = model.step(step, cache)
        outputs.append(y)
    return torch.cat(outputs)


@entry("mambapy", "MambaBlock, sequential scan", "x:float32:8", own=_mamba_steps)
def mambapy_block() -> nn.Module:
    from mambapy.mamba import MambaBlock, MambaConfig

    return MambaBlock(MambaConfig(d_model=8, n_layers=1, d_state=4, pscan=False))


def _min_gru_steps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    state, outputs = None, []
    for step in inputs["x"].unbind(1):
        y, state = model(step.unsqueeze(1), state, return_next_prev_hidden=True)
        outputs.append(y.squeeze(1))
    return torch.cat(outputs)


@entry("minGRU-pytorch", "minGRU, in parallel", "x:float32:4", own=_min_gru_steps)
def min_gru() -> nn.Module:
    from minGRU_pytorch import minGRU

    return minGRU(4)


class Leaky(nn.Module):
    """The loop of snntorch's first tutorials: two layers, with membrane potentials reset for each sequence."""

    def __init__(self, neuron: Any, **options: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 3)
        self.lif1, self.lif2 = neuron(beta=0.9, **options), neuron(beta=0.9, **options)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.lif1.init_leaky(), self.lif2.init_leaky()
        potentials = []
        for step in range(x.size(1)):
            spikes, first = self.lif1(self.fc1(x[:, step]), first)
            _, second = self.lif2(self.fc2(spikes), second)
            potentials.append(second)
        return torch.stack(potentials, 1)


@entry("snntorch", "Leaky, the loop of its tutorials", "x:float32:4")
def snntorch_leaky() -> nn.Module:
    import snntorch

    return Leaky(snntorch.Leaky)


class SpikingLSTM(nn.Module):
    """The loop of snntorch's tutorials around SLSTM."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        import snntorch

        self.lstm = snntorch.SLSTM(inputs, 8)

    def forward(self, x: Tensor) -> Tensor:
        synaptic, potential = self.lstm.init_slstm()
        potentials = []
        for step in x.unbind(1):
            _, synaptic, potential = self.lstm(step, synaptic, potential)
            potentials.append(potential)
        return torch.stack(potentials, 1)


@entry("snntorch", "SLSTM, 8 inputs and 8 states", "x:float32:8")
def snntorch_slstm_equal() -> nn.Module:
    return SpikingLSTM(8)


@entry("snntorch", "SLSTM, 4 inputs and 8 states: the package sets these to zero in every step", "x:float32:4")
def snntorch_slstm() -> nn.Module:
    return SpikingLSTM(4)


@entry("fastai", "AWD_LSTM, 2 layers", "inp:int64:")
def fastai_awd() -> nn.Module:
    from fastai.text.models.awdlstm import AWD_LSTM

    return AWD_LSTM(20, 8, 12, 2)


@entry("sb3-contrib", "the LSTM of RecurrentPPO", "x:float32:4", "starts:float32:")
def sb3_policy() -> nn.Module:
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 8)

        def forward(self, x: Tensor, starts: Tensor) -> Tensor:
            state = x.new_zeros(1, x.shape[0], 8), x.new_zeros(1, x.shape[0], 8)
            run = RecurrentActorCriticPolicy._process_sequence
            return run(x.flatten(0, 1), state, starts.flatten(), self.lstm)[0].view(*x.shape[:2], 8)

    return Policy()


@entry("norse", "LIF between linear layers", "x:float32:4")
def norse_lif() -> nn.Module:
    from norse.torch import LIF

    return TimeFirst(LIF())


@entry("norse", "LIFRecurrent", "x:float32:4")
def norse_recurrent() -> nn.Module:
    from norse.torch import LIFRecurrent

    return TimeFirst(LIFRecurrent(4, 6))


@entry("xlstm", "sLSTM layer", "x:float32:8")
def xlstm_slstm() -> nn.Module:
    from xlstm import sLSTMLayer, sLSTMLayerConfig

    return sLSTMLayer(sLSTMLayerConfig(embedding_dim=8, num_heads=2, backend="vanilla", dtype="float32"))


@entry("pytorch-tcn", "TCN of 2 blocks", "x:float32:4")
def pytorch_tcn() -> nn.Module:
    from pytorch_tcn import TCN

    return TCN(4, [8, 8], input_shape="NLC")


@entry("snntorch", "Synaptic and RLeaky", "x:float32:4")
def snntorch_synaptic() -> nn.Module:
    import snntorch

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.first = nn.Linear(4, 8), snntorch.Synaptic(alpha=0.9, beta=0.8)
            self.second = snntorch.RLeaky(beta=0.9, linear_features=8)

        def forward(self, x: Tensor) -> Tensor:
            synaptic, potential = self.first.init_synaptic()
            spikes, last = self.second.init_rleaky()
            potentials = []
            for step in x.unbind(1):
                y, synaptic, potential = self.first(self.fc(step), synaptic, potential)
                spikes, last = self.second(y, spikes, last)
                potentials.append(last)
            return torch.stack(potentials, 1)

    return Loop()


@entry("norse", "LSNN, recurrent", "x:float32:4")
def norse_lsnn() -> nn.Module:
    from norse.torch import LSNNRecurrent

    return TimeFirst(LSNNRecurrent(4, 6))


@entry("ncps", "CfC with a cell of memory", "x:float32:4", own=with_state)
def ncps_mixed() -> nn.Module:
    from ncps.torch import CfC

    return First(CfC(4, 12, batch_first=True, mixed_memory=True))


@entry("mingru-scans", "MinGRU, in parallel", "x:float32:4")
def min_gru_scans() -> nn.Module:
    from mingru import MinGRU

    layer: nn.Module = MinGRU(4, 8)
    return layer


@entry("yet-another-retnet", "RetNetDecoderLayer, in parallel", "x:float32:16")
def retnet() -> nn.Module:
    from yet_another_retnet.retnet import RetNetDecoderLayer

    return RetNetDecoderLayer(16, 2, dim_feedforward=16)


@entry("yet-another-retnet", "RetNetDecoderLayer, in a loop", "x:float32:16")
def retnet_loop() -> nn.Module:
    from yet_another_retnet.retnet import RetNetDecoderLayer

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = RetNetDecoderLayer(16, 2, dim_feedforward=16)

        def forward(self, x: Tensor) -> Tensor:
            state, outputs = None, []
            for t in range(x.shape[1]):
                y, state = self.layer.forward_recurrent(x[:, t], t, state)
                outputs.append(y)
            return torch.stack(outputs, 1)

    return Loop()


@entry("auto-esn", "DeepESN, 2 layers", "x:float32:4")
def auto_esn() -> nn.Module:
    from auto_esn.esn.esn import DeepESN

    class Reservoir(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reservoir = DeepESN(4, 8).reservoir

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.reservoir(x)
            return y

    return Reservoir()


@entry("pytorch-nlp", "a language model with WeightDropLSTM and LockedDropout", "x:int64:", alone=True)
def torchnlp_language_model() -> nn.Module:
    from torchnlp.nn import LockedDropout, WeightDropLSTM

    class LanguageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.drop = nn.Embedding(20, 8), LockedDropout(0.3)
            self.rnn, self.head = WeightDropLSTM(8, 12, num_layers=2, weight_dropout=0.5), nn.Linear(12, 20)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.rnn(self.drop(self.embed(x.transpose(0, 1))))[0])
            return y.transpose(0, 1)

    return LanguageModel()
