"""Modules that compute one step, exported with `--step`, and the loops in which their users call them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from conformance.packages.entry import entry


def with_states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Call the module step by step, passing back the states that it returned."""
    states: list[Any] = []
    outputs = []
    for step in zip(*(value.unbind(1) for value in inputs.values()), strict=True):
        y, *states = model(*step, *states)
        outputs.append(y)
    return torch.cat(outputs)


@cache
def _trained_policy() -> Any:
    from sb3_contrib import RecurrentPPO

    sizes = {"lstm_hidden_size": 16}
    ppo = RecurrentPPO("MlpLstmPolicy", "Pendulum-v1", n_steps=64, seed=1, policy_kwargs=sizes, device="cpu")
    with torch.inference_mode(False), torch.enable_grad():
        return ppo.learn(128).policy


def _policy_steps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    policy, state, outputs = _trained_policy(), None, []
    for obs, starts in zip(inputs["obs"].unbind(1), inputs["starts"].unbind(1), strict=True):
        action, state = policy.predict(obs.numpy(), state, starts.numpy(), deterministic=True)
        outputs.append(torch.from_numpy(action))
    return torch.cat(outputs)


@entry(
    "sb3-contrib",
    "a policy of RecurrentPPO, trained for 128 steps",
    "obs:float32:3",
    "starts:bool:",
    options=("--step", "--state", "h:float32:1xBx16=y1", "--state", "c:float32:1xBx16=y2"),
    own=_policy_steps,
)
def sb3_step() -> nn.Module:
    policy = _trained_policy()

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.lstm = policy.pi_features_extractor, policy.lstm_actor
            self.actor, self.head = policy.mlp_extractor, policy.action_net

        def forward(self, obs: Tensor, starts: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            going_on = (~starts).float().view(1, -1, 1)
            y, (h, c) = self.lstm(self.features(obs).unsqueeze(0), (going_on * h, going_on * c))
            return self.head(self.actor.forward_actor(y.squeeze(0))).clamp(-2, 2), h, c

    return Policy()


class XLSTMStep(nn.Module):
    """One step of an xlstm layer, with its two states as separate arguments."""

    def __init__(self, layer: Any, state: str) -> None:
        super().__init__()
        self.layer, self._state = layer, state

    def forward(self, x: Tensor, conv_state: Any = None, cell_state: Any = None) -> tuple[Tensor, Any, Any]:
        y, states = self.layer.step(x.unsqueeze(1), conv_state=conv_state, **{self._state: cell_state})
        return y.squeeze(1), states["conv_state"], states[self._state]


_XLSTM = "--step", "--state", "conv_state=y1", "--state", "cell_state=y2"


@entry("xlstm", "step of an mLSTM layer", "x:float32:8", options=_XLSTM, own=with_states)
def xlstm_mlstm_step() -> nn.Module:
    from xlstm import mLSTMLayer, mLSTMLayerConfig

    config = mLSTMLayerConfig(embedding_dim=8, num_heads=2, context_length=64, _num_blocks=1)
    return XLSTMStep(mLSTMLayer(config), "mlstm_state")


def _slstm_steps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    from xlstm.blocks.slstm.src.vanilla import slstm_pointwise_function_registry

    model.layer.slstm_cell.pointwise = slstm_pointwise_function_registry["slstm"]
    return with_states(model, inputs)


def _pointwise(wx: Tensor, ry: Tensor, b: Tensor, states: Tensor, constants: Any) -> tuple[Tensor, Tensor]:
    """The package's layer, with torch.where instead of `if torch.all(n == 0)`."""
    _, c, n, m = states.unbind(0)
    i, f, z, o = (wx + ry + b).view(-1, 4, c.shape[-1]).unbind(1)
    kept = m + nn.functional.logsigmoid(f)
    m = torch.where(n == 0, i, torch.maximum(i, kept))
    i, f = (i - m).exp().clamp(max=1), (kept - m).exp().clamp(max=1)
    c, n = f * c + i * z.tanh(), f * n + i
    return torch.stack((o.sigmoid() * c / n, c, n, m)), torch.stack((i, f, z, o))


@entry("xlstm", "step of an sLSTM layer, with torch.where", "x:float32:8", options=_XLSTM, own=_slstm_steps)
def xlstm_slstm_step() -> nn.Module:
    from xlstm import sLSTMLayer, sLSTMLayerConfig

    layer = sLSTMLayer(sLSTMLayerConfig(embedding_dim=8, num_heads=2, backend="vanilla", dtype="float32"))
    layer.slstm_cell.pointwise = _pointwise
    return XLSTMStep(layer, "slstm_state")


@entry(
    "snntorch",
    "step of SLSTM",
    "input_:float32:8",
    options=("--step", "--state", "syn=y1", "--state", "mem=y2"),
    own=with_states,
)
def snntorch_slstm_step() -> nn.Module:
    import snntorch

    return snntorch.SLSTM(8, 8)  # with different sizes, the package would reset its states in every step


@entry(
    "torchrl",
    "step of LSTMModule",
    "x:float32:4",
    "starts:bool:",
    options=("--step", "--state", "h:float32:2x8=y1", "--state", "c:float32:2x8=y2"),
    own=with_states,
)
def torchrl_lstm_step() -> nn.Module:
    from tensordict import TensorDict
    from torchrl.modules import LSTMModule

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = LSTMModule(4, 8, num_layers=2, in_key="x", out_key="y")

        def forward(self, x: Tensor, starts: Tensor, h: Any = None, c: Any = None) -> tuple[Tensor, Tensor, Tensor]:
            given = {"x": x, "is_init": starts.unsqueeze(1)}
            if h is not None:
                given |= {"recurrent_state_h": h, "recurrent_state_c": c}
            td = self.module(TensorDict(given, batch_size=x.shape[:1]))
            return td["y"], td["next", "recurrent_state_h"], td["next", "recurrent_state_c"]

    return Step()


def after(reset: Callable[[Any], None]) -> Callable[[Any, dict[str, Tensor]], Tensor]:
    """Reset the module, which keeps its state, and call it step by step."""

    def steps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        reset(model)
        return torch.cat([model(step) for step in inputs["x"].unbind(1)])

    return steps


@entry(
    "rsl-rl-lib",
    "RNN of an actor, which keeps its state",
    "x:float32:4",
    options=("--step",),
    own=after(lambda actor: actor.rnn.reset()),
)
def rsl_rl_step() -> nn.Module:
    from rsl_rl.modules import RNN

    class Actor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = RNN(4, 8, num_layers=2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.rnn(x).squeeze(0))
            return y

    return Actor()


@entry(
    "pytorch-tcn",
    "TCN of 2 blocks, its streaming call",
    "x:float32:4",
    options=("--step",),
    own=after(lambda step: step.network.reset_buffers()),
)
def pytorch_tcn_step() -> nn.Module:
    from pytorch_tcn import TCN

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = TCN(4, [8, 8], input_shape="NLC")

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.network(x.unsqueeze(1), inference=True)
            return y.squeeze(1)

    return Step()


@entry(
    "tianshou",
    "step of Recurrent, 2 layers",
    "obs:float32:4",
    options=("--step", "--state", "h:float32:Bx2x8=y1", "--state", "c:float32:Bx2x8=y2"),
    own=with_states,
)
def tianshou_step() -> nn.Module:
    from tianshou.utils.net.common import Recurrent

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Recurrent(layer_num=2, state_shape=4, action_shape=3, hidden_layer_size=8)

        def forward(self, obs: Tensor, h: Any = None, c: Any = None) -> tuple[Tensor, Tensor, Tensor]:
            y, state = self.net(obs, None if h is None else {"hidden": h, "cell": c})
            return y, state["hidden"], state["cell"]

    return Step()


class _MinStep(nn.Module):
    """One step of a minimal GRU; its state is its output."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, h: Any = None) -> tuple[Tensor, Tensor]:
        y, h = self.layer(x.unsqueeze(1), h, return_next_prev_hidden=True)
        return y.squeeze(1), h


@entry("minGRU-pytorch", "step of minGRU", "x:float32:4", options=("--step", "--state", "h=y1"), own=with_states)
def min_gru_step() -> nn.Module:
    from minGRU_pytorch import minGRU

    return _MinStep(minGRU(4))


@entry(
    "mingru-scans", "step of MinGRU", "x:float32:4", options=("--step", "--state", "h:float32:8=y1"), own=with_states
)
def min_gru_scans_step() -> nn.Module:
    from mingru import MinGRU

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = MinGRU(4, 8)

        def forward(self, x: Tensor, h: Any = None) -> tuple[Tensor, Tensor]:
            """Its state is what it is without one, 0.5, and h, which begins with zeros."""
            y: Tensor = self.layer.step(x, None if h is None else h + 0.5)
            return y, y - 0.5

    return Step()
