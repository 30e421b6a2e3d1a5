"""Packages of recurrent layers that loop over time with their own cells."""

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from conformance.packages.entries.sequences import First, TimeFirst, with_state
from conformance.packages.entry import bare, entry

_LAYERS = """
    BR CFN IndRNN JANET LEM LiGRU MCLSTM MGU MUT1 MinimalRNN MultiplicativeLSTM NAS PeepholeLSTM SCRN UGRNN coRNN
"""


def _register(name: str) -> None:
    def layer() -> nn.Module:
        return First(getattr(importlib.import_module("torchrecurrent"), name)(4, 8, batch_first=True))

    layer.__name__ = f"recurrent_{name.lower()}"
    globals()[layer.__name__] = entry("torchrecurrent", name, "x:float32:4", own=with_state)(layer)


for _name in _LAYERS.split():
    _register(_name)


@entry("cerebral-lstm", "CerebralLSTM, 2 layers", "x:float32:4", alone=True)
def cerebral_lstm() -> nn.Module:
    from cerebral_lstm import CerebralLSTM

    return TimeFirst(CerebralLSTM(4, 8, 2))


@entry("comfi-fast-grnn-torch", "ComfiFastGRNN, 2 layers", "x:float32:4", own=with_state, alone=True)
def comfi_fast_grnn() -> nn.Module:
    from comfi_fast_grnn_torch.ComfiFastGRNN import ComfiFastGRNN

    return First(ComfiFastGRNN(4, 8, 2))


@entry("ur-lstm-torch", "URLSTM, 2 layers", "x:float32:4", own=with_state, alone=True)
def ur_lstm() -> nn.Module:
    from ur_lstm import URLSTM

    return First(URLSTM(4, 8, 2, batch_first=True))


@entry("lru-pytorch", "LRU, which loops over the rows of a batch", "x:float32:4", alone=True)
def lru() -> nn.Module:
    from LRU_pytorch import LRU

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lru = LRU(4, 3, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.lru(x)
            return y

    return Layer()


@entry("s5-pytorch", "S5, in parallel", "x:float32:4", alone=True)
def s5() -> nn.Module:
    from s5 import S5

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s5 = S5(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.s5(x)
            return y

    return Layer()


@entry("gsmc-torch", "LSNNCell", "x_seq:float32:4", alone=True)
def gsmc_lsnn() -> nn.Module:
    from gsmc_torch import LSNNCell

    return LSNNCell(4, 8)


@entry("array-lstm", "ArrayLSTM, 2 cell states", "x:float32:4", alone=True)
def array_lstm() -> nn.Module:
    from arrayLSTM import ArrayLSTM

    return First(ArrayLSTM(4, 8, 2))


@entry("conv-lstm", "ConvLSTM, frames of 4 by 4", "x:float32:2x4x4", alone=True)
def conv_lstm() -> nn.Module:
    from conv_lstm import ConvLSTM

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = ConvLSTM(2, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.lstm(x)[0][0]
            return y

    return Layer()


@entry("torchxlstm", "sLSTM, which keeps its states in one tensor", "x:float32:8", alone=True)
def torchxlstm_slstm() -> nn.Module:
    from torchxlstm import sLSTM

    return First(sLSTM(8, 4, 2, batch_first=True))


@entry("torchxlstm", "mLSTM, which sums over the batch", "x:float32:8", alone=True)
def torchxlstm_mlstm() -> nn.Module:
    from torchxlstm import mLSTM

    return First(mLSTM(8, 4, 2, batch_first=True))


@entry("neuralfields", "NeuralField", "inputs:float32:4", alone=True)
def neural_field() -> nn.Module:
    from neuralfields import NeuralField

    field: nn.Module = NeuralField(input_size=4, hidden_size=8, output_size=2)
    return field


@entry("pytorch-spiking", "Lowpass", "inputs:float32:4", alone=True)
def lowpass() -> nn.Module:
    from pytorch_spiking import Lowpass

    layer: nn.Module = Lowpass(0.01, 4)
    return layer


@entry("pytorch-sublstm", "SubLSTM, 2 layers", "x:float32:4", alone=True)
def sublstm() -> nn.Module:
    from subLSTM.nn import SubLSTM

    return First(SubLSTM(4, 8, num_layers=2, batch_first=True))


@entry("minimamba", "S6, another scan from 32 steps on", "hidden_states:float32:8", alone=True)
def minimamba() -> nn.Module:
    from minimamba.config import MambaConfig
    from minimamba.s6 import S6

    layer: nn.Module = S6(MambaConfig(d_model=8, n_layer=1))
    return layer


@entry("sru", "SRU, 2 layers, a step of which is in C++", "x:float32:4", alone=True)
def sru() -> nn.Module:
    from sru import SRU

    return TimeFirst(SRU(4, 8, 2))


@entry("additive-recurrent-unit", "ARU, a loop in TorchScript", "x:float32:4", alone=True)
def aru() -> nn.Module:
    from aru import ARU

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aru = ARU(4, 8, use_embedding=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.aru(x, return_all_states=True)
            return y

    return Layer()


@entry("brc", "RNNModel of NBRC cells, in TorchScript", "x:float32:4", alone=True)
def brc_model() -> nn.Module:
    from brc_pytorch.modules import NBRC, RNNModel

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = RNNModel(4, 8, 3, 2, NBRC)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.model(x.transpose(0, 1), self.model.init_hidden(x.shape[0]))[0]
            return y.transpose(0, 1)

    return Model()


@entry("light-recurrent-unit-pytorch", "LightRecurrentUnit, 2 layers", "x:float32:8", own=with_state)
def light_recurrent_unit() -> nn.Module:
    from light_recurrent_unit_pytorch import LightRecurrentUnit

    return First(LightRecurrentUnit(8, depth=2))


@entry("light-recurrent-unit-pytorch", "LightRecurrentUnitBlock with a gate and a feed-forward part", "x:float32:8")
def light_recurrent_block() -> nn.Module:
    from light_recurrent_unit_pytorch import LightRecurrentUnitBlock

    block: nn.Module = LightRecurrentUnitBlock(8, depth=2, has_ff_block=True)
    return block


@entry("liquidnn", "LiquidNeuralNetwork, 2 layers", "x:float32:4", alone=True)
def liquid_network() -> nn.Module:
    from liquidnn import LiquidNeuralNetwork

    network: nn.Module = LiquidNeuralNetwork(4, 8, num_layers=2)
    return network


@entry("torchdyno", "Reservoir of an echo state network", "x:float32:4", alone=True)
def torchdyno_reservoir() -> nn.Module:
    bare("torchdyno", "torchdyno.models")
    from torchdyno.models.esn.reservoir import Reservoir

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reservoir = Reservoir(4, 8, leakage=0.5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.reservoir(x.transpose(0, 1), x.new_zeros(x.shape[0], 8))
            return y.transpose(0, 1)

    return Layer()


@entry("resdag", "ESNLayer, which keeps its state", "x:float32:4", alone=True, needs=("pytorch-symbolic",))
def resdag_esn() -> nn.Module:
    from resdag.layers import ESNLayer

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reservoir = ESNLayer(8, 4, spectral_radius=0.9, leak_rate=0.5, seed=1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.reservoir(x)
            return y

    return Layer()


@entry("neural-ssm", "LRU with complex states, in a loop", "x:float32:4", alone=True)
def neural_ssm_lru() -> nn.Module:
    bare("neural_ssm", "neural_ssm.ssm")
    from neural_ssm.ssm.cells.lti.lru import LRU

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lru = LRU(4, 3, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.lru(x, mode="loop")[0]
            return y

    return Layer()


@entry("neural-ssm", "REN, a recurrent equilibrium network", "u:float32:3", alone=True)
def neural_ssm_ren() -> nn.Module:
    bare("neural_ssm")
    from neural_ssm.rens.ren import REN

    network: nn.Module = REN(3, 2, 6, 4)
    return network


def _gated_delta_steps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    state, outputs = None, []
    for step in inputs["x"].unbind(1):
        y, state = model(step.unsqueeze(1), state, return_state=True)
        outputs.append(y.squeeze(1))
    return torch.cat(outputs)


@entry("opengdn", "GatedDeltaMixer, its reference", "x:float32:16", own=_gated_delta_steps, alone=True)
def opengdn_mixer() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):  # of its speed
        from opengdn import GatedDeltaMixer

        mixer: nn.Module = GatedDeltaMixer(16, 2, backend="reference")
    return mixer
