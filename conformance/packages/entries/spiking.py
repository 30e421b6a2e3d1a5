"""Packages of spiking neurons. Most keep the neurons' states in the module, and are reset between sequences."""

from typing import Any

import torch
from torch import Tensor, nn

from conformance.packages.entries.sequences import First, TimeFirst
from conformance.packages.entries.steps import after
from conformance.packages.entry import entry


class _TimeFirstAll(nn.Module):
    """A module that takes and returns (time, batch, ...)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x.transpose(0, 1))
        return y.transpose(0, 1)


@entry("spikingjelly", "LIFNode and ParametricLIFNode between linear layers", "x:float32:4")
def spikingjelly_lif() -> nn.Module:
    from spikingjelly.activation_based import functional, layer, neuron

    network = nn.Sequential(layer.Linear(4, 8), neuron.LIFNode(), layer.Linear(8, 3), neuron.ParametricLIFNode())
    functional.set_step_mode(network, "m")
    return _TimeFirstAll(network)


@entry("spikingjelly", "SpikingLSTM, 2 layers", "x:float32:4")
def spikingjelly_lstm() -> nn.Module:
    from spikingjelly.activation_based.rnn import SpikingLSTM

    return TimeFirst(SpikingLSTM(4, 8, 2))


def _reset(model: Any) -> None:
    from spikingjelly.activation_based import functional

    functional.reset_net(model)


@entry("spikingjelly", "step of LIFNode", "x:float32:4", options=("--step",), own=after(_reset))
def spikingjelly_step() -> nn.Module:
    from spikingjelly.activation_based import neuron

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 8), neuron.LIFNode(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers(x)
            return y

    return Step()


@entry("sinabs", "LIF with synapses, and ExpLeak", "x:float32:4")
def sinabs_lif() -> nn.Module:
    from sinabs.layers import LIF, ExpLeak

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 8), LIF(20.0, tau_syn=5.0), nn.Linear(8, 3), ExpLeak(30.0))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers(x)
            return y

    return Network()


@entry("sinabs", "LIFRecurrent", "input_data:float32:6")
def sinabs_recurrent() -> nn.Module:
    from sinabs.layers import LIFRecurrent

    layer: nn.Module = LIFRecurrent(20.0, nn.Linear(6, 6, bias=False))
    return layer


@entry("rockpool", "LIFTorch, recurrent", "x:float32:6", alone=True)
def rockpool_lif() -> nn.Module:
    from rockpool.nn.modules import LIFTorch

    return First(LIFTorch((6, 6), has_rec=True))


@entry("bindsnet", "step of LIFNodes", "x:float32:6", options=("--step",), alone=True)
def bindsnet_step() -> nn.Module:
    from bindsnet.network.nodes import LIFNodes

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nodes = LIFNodes(6, rest=0.0, reset=0.0, thresh=1.0)
            self.nodes.compute_decays(1.0)
            self.nodes.set_batch_size(1)

        def forward(self, x: Tensor) -> Tensor:
            self.nodes(x.clone())
            spikes: Tensor = self.nodes.s
            return spikes.float()

    return Step()


@entry("snntorch", "Alpha and RSynaptic", "x:float32:4")
def snntorch_alpha() -> nn.Module:
    import snntorch

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.first = nn.Linear(4, 8), snntorch.Alpha(alpha=0.9, beta=0.8)
            self.second = snntorch.RSynaptic(alpha=0.9, beta=0.8, linear_features=8)

        def forward(self, x: Tensor) -> Tensor:
            excited, inhibited, potential = self.first.init_alpha()
            spikes, synaptic, last = self.second.init_rsynaptic()
            potentials = []
            for step in x.unbind(1):
                y, excited, inhibited, potential = self.first(self.fc(step), excited, inhibited, potential)
                spikes, synaptic, last = self.second(y, spikes, synaptic, last)
                potentials.append(last)
            return torch.stack(potentials, 1)

    return Loop()
