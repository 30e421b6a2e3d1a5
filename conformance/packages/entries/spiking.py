"""Packages of spiking neurons. Most keep their states in the module, and are reset between sequences."""

from typing import Any

from torch import Tensor, nn

from conformance.packages.entries.sequences import First
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


@entry("spikingtorch", "SpikingNet with two layers of LIF", "x:float32:4", alone=True)
def spikingtorch_net() -> nn.Module:
    from spikingtorch import LIF, SpikingNet

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.neurons = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 3)]), nn.ModuleList([LIF(), LIF()])

        def forward(self, x: Tensor, init: bool) -> Tensor:
            x = x.squeeze(1)
            for layer, neuron in zip(self.layers, self.neurons, strict=True):
                x = neuron(layer(x), init)
            return x

    net: nn.Module = SpikingNet(Network(), (3,))
    return net
