"""The custom ops compute a layer in plain PyTorch and must equal PyTorch's own layer, also with lengths."""

import pytest
import torch
from onnxscript.function_libs.torch_lib.ops.core import aten_abs
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from unroll.export.lifting import recurrent_ops
from unroll.export.onnx.graph import unparsed_functions

LAYERS = [
    pytest.param("LSTM", nn.LSTM, {}, id="lstm"),
    pytest.param("GRU", nn.GRU, {}, id="gru"),
    pytest.param("RNN", nn.RNN, {}, id="tanh"),
    pytest.param("RNN", nn.RNN, {"nonlinearity": "relu"}, id="relu"),
]


def call(kind: str, module: nn.RNNBase, x: torch.Tensor, lens: torch.Tensor, state: tuple[torch.Tensor, ...]):
    weights = recurrent_ops.layer_weights(module, kind, 0).values()
    operator = getattr(torch.ops.unroll, kind.lower())
    extra = (module.nonlinearity.capitalize(),) if kind == "RNN" else ()
    return operator, (x, lens, *state, *weights, *extra)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "layer", "options"), LAYERS)
def test_op_equals_the_torch_layer(kind, layer, options, bias: bool, bidirectional: bool) -> None:
    module = layer(4, 5, bias=bias, bidirectional=bidirectional, **options).double()
    x, lens = torch.randn(7, 3, 4).double(), torch.tensor([7, 2, 5], dtype=torch.int32)
    state = tuple(torch.randn(2, 1 + bidirectional, 3, 5).double())[: 2 if kind == "LSTM" else 1]
    packed = pack_padded_sequence(x, lens, enforce_sorted=False)
    with torch.no_grad():
        out, hidden = module(packed, state if kind == "LSTM" else state[0])
        operator, arguments = call(kind, module, x, lens, state)
        y, *after = operator(*arguments)
    assert torch.allclose(y, pad_packed_sequence(out)[0], rtol=0, atol=1e-12)
    for ours, theirs in zip(after, hidden if kind == "LSTM" else (hidden,), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "layer", "options"), LAYERS)
def test_fake_kernel_has_the_real_shapes(kind, layer, options) -> None:
    module = layer(4, 5, **options).double()
    state = tuple(torch.randn(2, 1, 3, 5).double())[: 2 if kind == "LSTM" else 1]
    operator, arguments = call(kind, module, torch.randn(7, 3, 4).double(), torch.full((3,), 7), state)
    torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_onnxscript_function_knows_its_domain_without_its_source() -> None:
    domain = aten_abs.function_ir.domain
    with unparsed_functions():
        assert aten_abs.function_ir.domain == domain
