"""Packages for time series."""

from typing import Any

from torch import Tensor, nn

from conformance.packages.entries.sequences import First
from conformance.packages.entry import entry


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
