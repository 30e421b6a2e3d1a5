"""All rows. A package is imported only where its module is made, in an environment that has it."""

from typing import Any

import torch
from torch import Tensor, nn

from conformance.packages.entry import ENTRIES, entry

__all__ = ["ENTRIES"]


class First(nn.Module):
    """The first result of a module that returns more, called with `None` for its state."""

    def __init__(self, module: nn.Module, *more: Any) -> None:
        super().__init__()
        self.module, self._more = module, more

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(x, *self._more)[0]
        return result


class TimeFirst(First):
    """The same, of a module that takes (time, batch, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(x.transpose(0, 1), *self._more)[0]
        return result.transpose(0, 1)


def with_state(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The package's module called for one time step after another, with the state that it returned."""
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
    """The loop of snntorch's first tutorials: two layers, whose membrane potentials begin anew."""

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
