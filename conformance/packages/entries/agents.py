"""Recurrent policies from reinforcement learning packages."""

from typing import Any

import torch
from torch import Tensor, nn

from conformance.packages.entries.steps import with_states
from conformance.packages.entry import entry


@entry("rl-games", "LSTMWithDones, without dones", "x:float32:4", alone=True)
def rl_games_lstm() -> nn.Module:
    from rl_games.common.layers.recurrent import LSTMWithDones

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = LSTMWithDones(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.rnn(x.transpose(0, 1), None)
            return self.head(y.transpose(0, 1))

    return Network()


_HC = "--step", "--state", "h:float32:1xBx8=y1", "--state", "c:float32:1xBx8=y2"


@entry("pfrl", "step of RecurrentSequential", "x:float32:4", options=_HC, own=with_states)
def pfrl_step() -> nn.Module:
    from pfrl.nn import RecurrentSequential
    from pfrl.utils.recurrent import one_step_forward

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = RecurrentSequential(nn.Linear(4, 6), nn.ReLU(), nn.LSTM(6, 8), nn.Linear(8, 2))

        def forward(self, x: Tensor, h: Any = None, c: Any = None) -> tuple[Tensor, Tensor, Tensor]:
            y, ((h, c),) = one_step_forward(self.network, x, None if h is None else ((h, c),))
            return y, h, c

    return Step()


class _SkrlPolicy(nn.Module):
    """The LSTM model of skrl's examples, as a single step."""

    def __init__(self) -> None:
        super().__init__()
        from gymnasium.spaces import Box
        from skrl.models.torch import DeterministicMixin, Model

        class Policy(DeterministicMixin, Model):
            def __init__(self) -> None:
                spaces: dict[str, Any] = {"observation_space": Box(-1, 1, (4,)), "action_space": Box(-1, 1, (2,))}
                Model.__init__(self, **spaces, device="cpu")
                DeterministicMixin.__init__(self)
                self.lstm, self.net = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)

            def compute(self, inputs: Any, role: str = "") -> Any:
                h, c = inputs["rnn"]
                states = inputs["observations"]
                y, rnn = self.lstm(states.view(-1, 1, states.shape[-1]), (h.contiguous(), c.contiguous()))
                return self.net(torch.flatten(y, 0, 1)), {"rnn": [*rnn]}

        self.policy = Policy()

    def forward(self, x: Tensor, h: Any = None, c: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        zeros = x.new_zeros(1, len(x), 8)
        given = {"observations": x, "rnn": [zeros, zeros] if h is None else [h, c]}
        action, outputs = self.policy.act(given)
        return action, *outputs["rnn"]


@entry("skrl", "step of a policy with an LSTM", "x:float32:4", options=_HC, own=with_states)
def skrl_step() -> nn.Module:
    return _SkrlPolicy()
