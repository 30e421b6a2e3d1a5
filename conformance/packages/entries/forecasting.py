"""Packages for time series, and for graphs that change in time."""

from typing import Any

import torch
from torch import Tensor, nn

from conformance.packages.entries.sequences import First, with_state
from conformance.packages.entry import bare, entry


@entry("darts", "the module of RNNModel, an LSTM", "x:float32:2", alone=True)
def darts_rnn() -> nn.Module:
    from darts.models.forecasting.pl_forecasting_module import ModuleStage
    from darts.models.forecasting.rnn_model import _RNNModule
    from darts.utils.data.torch_datasets.utils import PLModuleInput

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes: Any = {
                "input_size": 2,
                "hidden_dim": 8,
                "num_layers": 2,
                "target_size": 2,
                "nr_params": 1,
                "dropout": 0.1,
            }
            self.module = _RNNModule(name="LSTM", input_chunk_length=8, output_chunk_length=1, **sizes)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.module(PLModuleInput(past_target=x, stage=ModuleStage.TRAIN)).prediction
            return y

    return Model()


@entry("pytorch-forecasting", "LSTM that takes lengths", "x:float32:4", own=with_state, alone=True)
def forecasting_lstm() -> nn.Module:
    from pytorch_forecasting.models.nn import LSTM

    return First(LSTM(4, 8, num_layers=2, batch_first=True))


def _dilated(cell: str) -> nn.Module:
    from neuralforecast.models.dilated_rnn import DRNN

    return First(DRNN(4, 8, 2, [1, 2], cell_type=cell))


@entry("neuralforecast", "DRNN of GRUs, dilated by 1 and 2", "x:float32:4", alone=True)
def dilated_gru() -> nn.Module:
    return _dilated("GRU")


@entry("neuralforecast", "DRNN of ResLSTMs, not dilated", "x:float32:4", alone=True)
def residual_lstm() -> nn.Module:
    from neuralforecast.models.dilated_rnn import DRNN

    return First(DRNN(4, 8, 2, [1, 1], cell_type="ResLSTM"))


@entry("neuralforecast", "LSTM, recurrent", "x:float32:", alone=True)
def neuralforecast_lstm() -> nn.Module:
    from neuralforecast.models import LSTM

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LSTM(h=1, input_size=8, encoder_hidden_size=8, recurrent=True)

        def forward(self, x: Tensor) -> Tensor:
            nothing = dict.fromkeys(("futr_exog", "hist_exog", "stat_exog"))
            y: Tensor = self.model({"insample_y": x.unsqueeze(2), **nothing})
            return y

    return Model()


class Graph(nn.Module):
    """A recurrent layer on a ring of five nodes."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer, self._size = layer, size
        ring = torch.arange(5)
        self.register_buffer("edges", torch.stack([ring, (ring + 1) % 5]))

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 5, self._size)
        outputs = []
        for step in x.unbind(1):
            h = self.layer(step, self.edges, None, h)
            outputs.append(h)
        return torch.stack(outputs, 1)


def _graph(module: str, name: str) -> Any:
    import importlib

    bare("torch_geometric_temporal", "torch_geometric_temporal.nn", "torch_geometric_temporal.nn.recurrent")
    return getattr(importlib.import_module(f"torch_geometric_temporal.nn.recurrent.{module}"), name)


@entry("torch-geometric-temporal", "GConvGRU on a fixed graph", "x:float32:5x4", alone=True)
def gconv_gru() -> nn.Module:
    return Graph(_graph("gconv_gru", "GConvGRU")(4, 3, 2), 3)


@entry("torch-geometric-temporal", "TGCN2 on a fixed graph", "x:float32:5x4", alone=True)
def tgcn() -> nn.Module:
    return Graph(_graph("temporalgcn", "TGCN2")(4, 3, 1), 3)
