"""Reference implementations of GRU, LSTM and tanh RNN, and the two orders in which a stack of them can run.

They are for reading and testing: plain tensor operations, one time step of one layer at a time. In a stack,

    h[l][t] = cell(h[l-1][t], h[l][t-1])        with h[-1] = x

and h[l][t] depends on nothing else. Any order that computes those two first gives the same numbers: layer by layer over
the whole sequence, or step by step through all layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: The state of one layer: (h,), or for an LSTM (h, c); each (batch, hidden).
State = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: its cell, and its weights in PyTorch's layout, with the gates stacked along the first axis."""

    cell: Callable[["Layer", torch.Tensor, State], State]
    w_ih: torch.Tensor  # (gates * hidden, inputs)
    w_hh: torch.Tensor  # (gates * hidden, hidden)
    b_ih: torch.Tensor | None  # (gates * hidden,)
    b_hh: torch.Tensor | None  # (gates * hidden,)

    def step(self, x: torch.Tensor, state: State) -> State:
        """One time step. x: (batch, inputs); the new state's h is the layer's output."""
        return self.cell(self, x, state)

    def zeros(self, batch: int) -> State:
        """The default initial state of a sequence."""
        h = self.w_hh.new_zeros(batch, self.w_hh.shape[1])
        return (h, h) if self.cell is lstm else (h,)

    def from_input(self, x: torch.Tensor) -> torch.Tensor:
        """W_i x + b_i of every gate: (batch, gates * hidden)."""
        return nn.functional.linear(x, self.w_ih, self.b_ih)

    def from_hidden(self, h: torch.Tensor) -> torch.Tensor:
        """W_h h + b_h of every gate: (batch, gates * hidden)."""
        return nn.functional.linear(h, self.w_hh, self.b_hh)


def gru(layer: Layer, x: torch.Tensor, state: State) -> State:
    """Cho et al. 2014, with the reset gate where PyTorch and cuDNN put it: after the product with W_hn.

    r = σ(W_ir x + b_ir + W_hr h + b_hr)
    z = σ(W_iz x + b_iz + W_hz h + b_hz)
    n = tanh(W_in x + b_in + r ⊙ (W_hn h + b_hn))
    h' = (1 - z) ⊙ n + z ⊙ h

    The paper has W_hn (r ⊙ h); the two are different functions (in ONNX, linear_before_reset 1 and 0).
    """
    (h,) = state
    r_x, z_x, n_x = layer.from_input(x).chunk(3, dim=1)
    r_h, z_h, n_h = layer.from_hidden(h).chunk(3, dim=1)
    r = torch.sigmoid(r_x + r_h)
    z = torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return ((1 - z) * n + z * h,)


def lstm(layer: Layer, x: torch.Tensor, state: State) -> State:
    """Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000.

    i, f, o = σ(W_i x + b_i + W_h h + b_h), each with its own rows of the weights
    g = tanh(W_ig x + b_ig + W_hg h + b_hg)
    c' = f ⊙ c + i ⊙ g
    h' = o ⊙ tanh(c')
    """
    h, c = state
    i, f, g, o = (layer.from_input(x) + layer.from_hidden(h)).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def rnn(layer: Layer, x: torch.Tensor, state: State) -> State:
    """Elman 1990: h' = tanh(W_i x + b_i + W_h h + b_h)."""
    (h,) = state
    return (torch.tanh(layer.from_input(x) + layer.from_hidden(h)),)


def layer_by_layer(
    layers: Sequence[Layer], x: torch.Tensor, states: Sequence[State]
) -> tuple[torch.Tensor, list[State]]:
    """Each layer over the whole sequence, then the next layer over its outputs.

    Args:
        x: (batch, time, inputs).
        states: one per layer.

    Returns:
        The last layer's h at every time step, (batch, time, hidden), and the final state of every layer.
    """
    sequence = list(x.unbind(1))
    reached = []
    for layer, state in zip(layers, states, strict=True):
        for t in range(len(sequence)):
            state = layer.step(sequence[t], state)
            sequence[t] = state[0]
        reached.append(state)
    return torch.stack(sequence, dim=1), reached


def step_by_step(layers: Sequence[Layer], x: torch.Tensor, states: Sequence[State]) -> tuple[torch.Tensor, list[State]]:
    """Each time step through all layers, then the next time step. Arguments and results as for `layer_by_layer`."""
    states = list(states)
    outputs = []
    for h in x.unbind(1):
        for i, layer in enumerate(layers):
            states[i] = layer.step(h, states[i])
            h = states[i][0]
        outputs.append(h)
    return torch.stack(outputs, dim=1), states


def layers_of(module: nn.RNNBase) -> list[Layer]:
    """The layers of an `nn.GRU`, `nn.LSTM` or tanh `nn.RNN`, sharing its weights.

    Raises:
        ValueError: for a reverse direction, a projection or ReLU, which the equations above do not cover.
    """
    cell = {"GRU": gru, "LSTM": lstm, "RNN_TANH": rnn}.get(module.mode)
    if cell is None or module.bidirectional or module.proj_size:
        raise ValueError(f"no equations here for {module}")

    def weight(name: str, i: int) -> Any:
        return getattr(module, f"{name}_l{i}", None)  # None for a module without biases

    return [
        Layer(cell, weight("weight_ih", i), weight("weight_hh", i), weight("bias_ih", i), weight("bias_hh", i))
        for i in range(module.num_layers)
    ]
