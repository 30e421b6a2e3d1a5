"""A probabilistic forecaster for many series, with the architecture of DeepAR.

A step consists of the last scaled value and calendar features. The series id is a static input.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

_SERIES, _CALENDAR = 370, 4


class Forecaster(nn.Module):
    def __init__(self, hidden: int = 40, embedding: int = 20) -> None:
        super().__init__()
        self.embed = nn.Embedding(_SERIES, embedding)
        self.rnn = nn.LSTM(1 + _CALENDAR + embedding, hidden, 3, batch_first=True, dropout=0.1)
        self.mean, self.deviation = nn.Linear(3 * hidden, 1), nn.Linear(3 * hidden, 1)
        self.mix = nn.Linear(hidden, 3 * hidden)

    def forward(self, value: Tensor, calendar: Tensor, series: Tensor) -> dict[str, Tensor]:
        """value (batch, time, 1), calendar (batch, time, 4), series (batch,) -> mean and deviation of the next."""
        known = self.embed(series)[:, None].expand(-1, value.shape[1], -1)
        hidden = self.mix(self.rnn(torch.cat([value, calendar, known], -1))[0]).relu()
        return {"mean": self.mean(hidden), "deviation": functional.softplus(self.deviation(hidden))}


def build() -> Forecaster:
    torch.manual_seed(0)
    return Forecaster().eval()


def example() -> dict[str, Tensor]:
    return {
        "value": torch.rand(2, 24, 1) * 2,
        "calendar": torch.rand(2, 24, _CALENDAR) - 0.5,
        "series": torch.randint(0, _SERIES, (2,)),
    }
