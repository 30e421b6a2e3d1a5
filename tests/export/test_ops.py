"""The custom ops compute a layer in plain PyTorch and must equal PyTorch's own layer, also with lengths.

Nodes of the graph give the values of PyTorch's functions for zeros, subnormal and huge numbers, too.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from onnxscript.function_libs.torch_lib.ops.core import aten_abs
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from conformance.kinds.kind import gru, made
from conformance.oracle import Graph
from unroll import bundle
from unroll.export import export
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


#: Functions of PyTorch that graphs often have.
FUNCTIONS = {
    **{name: getattr(torch, name) for name in ("sigmoid", "tanh", "relu", "erf", "round", "floor", "sign")},
    **{
        name: getattr(functional, name)
        for name in ("softplus", "silu", "gelu", "elu", "logsigmoid", "hardtanh", "mish")
    },
    "glu": lambda x: functional.glu(torch.cat([x, x], -1)),
    "where": lambda x: torch.where(x > 0, x, x / 2),
    "clamp": lambda x: x.clamp(-1, 1),
    "layer_norm": lambda x: functional.layer_norm(x, (4,)),
    "softmax": lambda x: x.softmax(-1),
    "divided": lambda x: x / (1 + x.abs()),
    "sqrt": lambda x: (x * x + 1e-6).sqrt(),
    "maximum": lambda x: torch.maximum(x, torch.zeros(())),
    "log1p": lambda x: torch.log1p(x.abs()),
    "normalize": lambda x: functional.normalize(x, dim=-1),
    "cumsum": lambda x: x.cumsum(-1),
    "exp": lambda x: torch.exp(-x.abs()),
}


@pytest.mark.long
def test_zeros_subnormal_and_huge_numbers_give_the_values_of_pytorch(tmp_path: Path) -> None:
    model = made(lambda s, x: {"rnn": s.rnn(x)[0]} | {name: f(x) for name, f in FUNCTIONS.items()}, rnn=gru())
    path = export(model, {"x": torch.randn(2, 7, 4)}, name="m", repository=tmp_path).path
    graph, double = Graph(bundle.read(path)), copy.deepcopy(model).double()
    for value in (sign * size for size in (0.0, 1e-40, 20, 100, 1e4, 1e10, 1e18) for sign in (1, -1)):
        x = np.array([[[value] * 4, [value, 1, -1, 0.5]]], np.float32)
        found, _ = graph.run({"x": x}, graph.start({"x": x}))
        with torch.no_grad():
            single, exact = model(torch.from_numpy(x)), double(torch.from_numpy(x).double())
        for name, array in found.items():
            own, scale = (single[name] - exact[name]).abs().max(), exact[name].abs().max().clamp(min=1)
            assert np.abs(array - exact[name].numpy()).max() <= 4 * own + 1e-6 * scale, (name, value)
