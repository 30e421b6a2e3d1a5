"""Both orders agree with PyTorch, and with each other to the last bit."""

from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unroll.models.reference import Layer, State, layer_by_layer, layers_of, step_by_step

MODULES: list[Callable[..., nn.RNNBase]] = [nn.GRU, nn.LSTM, nn.RNN]
ORDERS = [layer_by_layer, step_by_step]


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.RNNBase, torch.Tensor, list[State]]:
    """Return a float64 module, a batch of sequences for it, and an initial state."""
    size = st.integers(1, 6)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    module = draw(st.sampled_from(MODULES))(
        draw(size), draw(size), draw(st.integers(1, 4)), bias=draw(st.booleans()), batch_first=True
    ).double()
    # PyTorch's initial weights are small; larger ones also saturate the gates.
    scale = draw(st.sampled_from([1.0, 3.0]))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    x = torch.randn(draw(size), draw(st.integers(1, 12)), module.input_size, dtype=torch.float64)
    states = [layer.zeros(len(x)) for layer in layers_of(module)]
    if draw(st.booleans()):
        states = [tuple(torch.randn_like(piece) for piece in state) for state in states]
    return module.requires_grad_(False), x, states


def run(module: nn.RNNBase, x: torch.Tensor, states: list[State]) -> tuple[torch.Tensor, list[State]]:
    """Return PyTorch's own outputs, and its states as a list by layer."""
    pieces = tuple(torch.stack(piece) for piece in zip(*states, strict=True))
    output, reached = module(x, pieces if isinstance(module, nn.LSTM) else pieces[0])
    reached = reached if isinstance(module, nn.LSTM) else (reached,)
    return output, [tuple(piece[i] for piece in reached) for i in range(module.num_layers)]


def assert_close(actual: tuple[torch.Tensor, list[State]], expected: tuple[torch.Tensor, list[State]]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@given(cases())
@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("order", ORDERS)
def test_order_equals_pytorch(order: Callable[..., tuple[torch.Tensor, list[State]]], case: tuple) -> None:
    module, x, states = case
    assert_close(order(layers_of(module), x, states), run(module, x, states))


@given(cases())
@settings(deadline=None, max_examples=30)
def test_orders_are_equal_to_the_last_bit(case: tuple) -> None:
    module, x, states = case
    layers = layers_of(module)
    torch.testing.assert_close(layer_by_layer(layers, x, states), step_by_step(layers, x, states), rtol=0, atol=0)


@given(cases(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_every_valid_order_is_equal_to_the_last_bit(case: tuple, random: Random) -> None:
    module, x, states = case
    layers = layers_of(module)
    assert torch.equal(in_random_order(layers, x, states, random), step_by_step(layers, x, states)[0])


def in_random_order(layers: list[Layer], x: torch.Tensor, states: list[State], random: Random) -> torch.Tensor:
    """Repeatedly step a random layer whose next input is available."""
    queues = [list(x.unbind(1)), *([] for _ in layers)]
    states, done = list(states), [0] * len(layers)
    while done[-1] < x.shape[1]:
        i = random.choice([i for i in range(len(layers)) if done[i] < len(queues[i])])
        states[i] = layers[i].step(queues[i][done[i]], states[i])
        queues[i + 1].append(states[i][0])
        done[i] += 1
    return torch.stack(queues[-1], dim=1)


@given(cases())
@settings(deadline=None, max_examples=30)
def test_one_module_equals_single_layer_modules_in_a_chain(case: tuple) -> None:
    module, x, states = case
    output, reached = x, []
    for i in range(module.num_layers):
        single = type(module)(
            output.shape[2], module.hidden_size, bias=module.bias, batch_first=True, dtype=torch.float64
        ).requires_grad_(False)
        single.load_state_dict(
            {name[:-1] + "0": tensor for name, tensor in module.state_dict().items() if name.endswith(f"_l{i}")}
        )
        output, state = run(single, output, states[i : i + 1])
        reached += state
    assert_close((output, reached), run(module, x, states))


@given(cases(), st.data())
@settings(deadline=None, max_examples=30)
def test_chunks_with_the_state_carried_equal_the_whole(case: tuple, data: st.DataObject) -> None:
    module, x, states = case
    layers = layers_of(module)
    whole = layer_by_layer(layers, x, states)
    outputs = []
    rest = x
    while rest.shape[1]:
        length = data.draw(st.integers(1, rest.shape[1]))
        order = data.draw(st.sampled_from(ORDERS))
        output, states = order(layers, rest[:, :length], states)
        outputs.append(output)
        rest = rest[:, length:]
    torch.testing.assert_close((torch.cat(outputs, dim=1), states), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    "module",
    [nn.GRU(2, 3, bidirectional=True), nn.LSTM(2, 3, proj_size=1), nn.RNN(2, 3, nonlinearity="relu")],
    ids=["bidirectional", "projection", "relu"],
)
def test_layers_without_equations_are_refused(module: nn.RNNBase) -> None:
    with pytest.raises(ValueError, match="no equations here"):
        layers_of(module)
