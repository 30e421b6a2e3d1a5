"""Packages of many recurrent layers, and of one: each loops over time with cells of its own."""

import importlib

from torch import Tensor, nn

from conformance.packages.entries.sequences import First, TimeFirst, with_state
from conformance.packages.entry import entry

_LAYERS = "IndRNN LEM LiGRU MCLSTM MUT1 PeepholeLSTM SCRN"


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
