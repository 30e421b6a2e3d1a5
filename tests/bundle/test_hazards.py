"""A graph may divide floats by anything, but integers only by constants other than -1."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from unroll.bundle.graph import ALLOWED, operators

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
CONSTANTS = {"two": np.int64(2), "minus": np.int64(-1), "half": np.float32(0.5), "yes": np.array(True)}


def node(operator: str, *names: str, **attributes: object) -> onnx.NodeProto:
    *inputs, output = names
    return helper.make_node(operator, inputs, [output], **attributes)


def found(*nodes: onnx.NodeProto) -> set[str]:
    """Return the forbidden operators in a graph of these nodes, with the inputs `x` (float) and `n` (integer)."""
    values = [helper.make_tensor_value_info(name, kind, [4]) for name, kind in (("x", FLOAT), ("n", INT))]
    outputs = [helper.make_tensor_value_info("y", FLOAT, None)]
    constants = [numpy_helper.from_array(np.array(value), name) for name, value in CONSTANTS.items()]
    model = helper.make_model(helper.make_graph(nodes, "graph", values, outputs, constants))
    return operators(model.SerializeToString()).keys() - ALLOWED


def body(*nodes: onnx.NodeProto, inputs: str = "", kind: int = FLOAT) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(name, kind, None) for name in inputs]
    return helper.make_graph(nodes, "body", values, [helper.make_tensor_value_info("b", kind, None)])


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Div", "x", "x", "y")],
        [node("ReduceSum", "x", "s"), node("Exp", "s", "e"), node("Div", "e", "s", "y")],
        [node("Cast", "n", "c", to=FLOAT), node("Add", "c", "half", "d"), node("Mod", "d", "c", "y", fmod=1)],
        [node("Greater", "x", "half", "g"), node("Where", "g", "x", "half", "w"), node("Div", "w", "w", "y")],
        [node("Shape", "x", "s"), node("ConstantOfShape", "s", "c"), node("Div", "c", "c", "y")],
        [helper.make_node("Split", ["x"], ["p", "q"], num_outputs=2), node("Div", "p", "q", "y")],
        [node("If", "yes", "i", then_branch=body(node("Exp", "x", "b"))), node("Div", "i", "i", "y")],
        [node("Scan", "x", "y", num_scan_inputs=1, body=body(node("Div", "a", "a", "b"), inputs="a"))],
        [node("Div", "n", "two", "y")],
        [node("Constant", "c", value_int=3), node("CastLike", "c", "half", "f"), node("Div", "f", "f", "y")],
        [node("Constant", "c", value=helper.make_tensor("", INT, [1], [3])), node("Mod", "n", "c", "y")],
    ],
)
def test_division_that_cannot_crash_is_allowed(nodes: list[onnx.NodeProto]) -> None:
    assert not found(*nodes)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Div", "n", "n", "y")],
        [node("Div", "two", "n", "y")],
        [node("Mod", "n", "minus", "y")],
        [node("Constant", "c", value=helper.make_tensor("", INT, [1], [-1])), node("Div", "n", "c", "y")],
        [node("Identity", "minus", "m"), node("Div", "n", "m", "y")],
        [node("ArgMax", "x", "a"), node("Div", "two", "a", "y")],
        [helper.make_node("TopK", ["x", "two"], ["p", "q"]), node("Div", "q", "q", "y")],
        [node("Cast", "x", "c", to=INT), node("Reshape", "c", "n", "r"), node("Div", "r", "c", "y")],
        [node("Scan", "n", "y", num_scan_inputs=1, body=body(node("Div", "a", "a", "b"), inputs="a", kind=INT))],
        [
            node("Scan", "n", "s", num_scan_inputs=1, body=body(node("Neg", "a", "b"), inputs="a", kind=INT)),
            node("Div", "s", "s", "y"),
        ],
    ],
)
def test_integer_division_by_a_computed_integer_is_forbidden(nodes: list[onnx.NodeProto]) -> None:
    assert len(found(*nodes)) == 1
