"""Packages for time series."""

from typing import Any

import torch
from torch import Tensor, nn

from conformance.packages.entries.sequences import First
from conformance.packages.entry import bare, entry


@entry("darts", "the module of RNNModel, an LSTM", "x:float32:2")
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


@entry("neuralforecast", "DRNN of GRUs, dilated by 1 and 2", "x:float32:4")
def dilated_gru() -> nn.Module:
    from neuralforecast.models.dilated_rnn import DRNN

    return First(DRNN(4, 8, 2, [1, 2], cell_type="GRU"))


@entry("pytorch-forecasting", "its LSTM, which takes lengths", "x:float32:4")
def forecasting_lstm() -> nn.Module:
    from pytorch_forecasting.models.nn.rnn import LSTM

    return First(LSTM(4, 8, num_layers=2, batch_first=True))


_GRUD = "values:float32:3", "mask:float32:3", "deltas:float32:3", "filled:float32:3"


@entry("pypots", "the backbone of GRU-D", *_GRUD, alone=True)
def pypots_grud() -> nn.Module:
    bare("pypots", "pypots.nn", "pypots.nn.modules")
    from pypots.nn.modules.grud import BackboneGRUD

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = BackboneGRUD(1, 3, 8)

        def forward(self, values: Tensor, mask: Tensor, deltas: Tensor, filled: Tensor) -> Tensor:
            self.backbone.n_steps = values.shape[1]
            y: Tensor = self.backbone(values, mask, deltas, values.new_zeros(3), filled)[0]
            return y

    return Backbone()


@entry("tsai", "TCN, whose answer is a mean over time", "x:float32:3", alone=True, needs=("fastai", "fastcore"))
def tsai_tcn() -> nn.Module:
    bare("torchvision", "tsai", "tsai.models")
    from tsai.models.TCN import TCN

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = TCN(3, 2, layers=[8, 8], ks=3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.network(x.transpose(1, 2))
            return y

    return Network()


@entry("tsai", "LSTM, whose answer is of the last step", "x:float32:3", alone=True, needs=("fastai", "fastcore"))
def tsai_lstm() -> nn.Module:
    bare("torchvision", "tsai", "tsai.models")
    from tsai.models.RNN import LSTM

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = LSTM(3, 2, hidden_size=8, n_layers=2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.network(x.transpose(1, 2))
            return y

    return Network()


@entry("torch-kf", "KalmanFilter of positions and speeds", "x:float32:2", alone=True)
def kalman_filter() -> nn.Module:
    from torch_kf import GaussianState, KalmanFilter

    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.motion, self.measured = (
                nn.Parameter(torch.eye(4) + torch.diag(torch.ones(2), 2)),
                nn.Parameter(torch.eye(2, 4)),
            )
            self.filter = KalmanFilter(self.motion, self.measured, 0.1 * torch.eye(4), torch.eye(2))

        def forward(self, x: Tensor) -> Tensor:
            state = GaussianState(x.new_zeros(len(x), 4, 1), torch.eye(4).expand(len(x), 4, 4))
            means = []
            for step in x.unbind(1):
                state = self.filter.update(self.filter.predict(state), step.unsqueeze(2))
                means.append(state.mean.squeeze(2))
            return torch.stack(means, 1)

    return Filter()
