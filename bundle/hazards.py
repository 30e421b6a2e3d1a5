"""Detects nodes that may crash the process or compute random numbers, although their operators are allowed.

onnxruntime checks integer divisors for 0 but not for -1. Dividing the smallest integer by -1 crashes the process, so
integers may be divided only by constants. Graphs do not declare the types of inner tensors, so the types are inferred;
tensors of unknown type count as integers. A GRU or LSTM that gets an empty sequence or batch also crashes the process,
unless it has the input `sequence_lens`, which export writes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from unroll.bundle.protobuf import fields, numbers

# Field numbers of onnx.proto.
_NAME, _TYPE, _TENSOR_TYPE, _ELEMENT = 1, 2, 1, 1  # of a value, its type and the type of a tensor
_TENSOR_NAME, _DATA_TYPE, _RAW_DATA, _INTEGERS = 8, 2, 9, {5, 7}  # of a tensor

_FLOATS = {1, 10, 11, 16}
_SIGNED = {6: "<i4", 7: "<i8"}
#: Operators with a single type for all inputs and the output.
_ALIKE = {"Add", "Concat", "Div", "Gemm", "MatMul", "Max", "Mean", "Min", "Mod", "Mul", "PRelu", "Sub", "Sum"}
#: Index of the input that determines the output's type, if it is not the first.
_TYPED_BY = {"CastLike": 1, "OneHot": 2, "Where": 1}
#: Operators where only the first output has the type of the first input.
_OTHERS_DIFFER = {"Dropout", "MaxPool", "TopK", "Unique"}
_ALWAYS = {"DequantizeLinear", "com.microsoft.DynamicQuantizeLSTM"}
_ALWAYS |= {"com.microsoft.DynamicQuantizeMatMul", "com.microsoft.MatMulIntegerToFloat"}
#: Layers that crash without it, and the index of their input `sequence_lens`.
_LAYERS, _LENGTHS = {"GRU", "LSTM", "com.microsoft.DynamicQuantizeLSTM"}, 4
#: Operators with another output type than their first input's, or one that an attribute specifies.
_UNKNOWN = frozenset(
    """
    And ArgMax ArgMin ConvInteger DynamicQuantizeLinear Equal EyeLike Greater GreaterOrEqual IsInf IsNaN Less
    LessOrEqual MatMulInteger MelWeightMatrix NonZero Not Or QLinearConv QLinearMatMul QuantizeLinear SequenceEmpty
    SequenceLength Shape Size Xor
    """.split()  # noqa: SIM905 as the allow-list
)


@dataclass(slots=True)
class Node:
    """A node. numbers, tensors: attributes of these kinds. bodies: which outputs of each subgraph are floats."""

    operator: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, memoryview] = field(default_factory=dict)
    bodies: list[list[bool]] = field(default_factory=list)


@dataclass(slots=True)
class Scope:
    """Facts about tensors, by name.

    Attributes:
        floats: Whether each tensor is a float.
        constants: Tensors with constant values other than -1.
    """

    floats: dict[str, bool] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)

    def inner(self) -> "Scope":
        return Scope(dict(self.floats), set(self.constants))

    def add_value(self, value: memoryview) -> str:
        """Add an input or output of a graph, which declares its type. Returns its name."""
        name, element = "", 0
        for number, part in fields(value):
            if number == _NAME and not isinstance(part, int):
                name = str(part, "utf-8")
            elif number == _TYPE:
                element = _element(part) or element
        self.floats.setdefault(name, element in _FLOATS)
        return name

    def add_constant(self, tensor: memoryview, name: str = "") -> None:
        """Add a constant. name: used if the tensor has no name."""
        for number, part in fields(tensor):
            if number == _TENSOR_NAME and not name and not isinstance(part, int):
                name = str(part, "utf-8")
        kind = _kind(tensor)
        self.floats[name] = kind in _FLOATS
        self.constants.discard(name)
        if not _has_minus_one(tensor, kind):
            self.constants.add(name)

    def add_node(self, node: Node) -> str:
        """Add a node's outputs. Returns its operator, with a suffix if the node is a hazard."""
        for name, is_float in zip(node.outputs, self._float_outputs(node), strict=False):
            self.floats[name] = is_float
            self.constants.discard(name)
        if node.operator == "Constant" and "value" in node.tensors and node.outputs:
            self.add_constant(node.tensors["value"], node.outputs[0])
        return node.operator + self._hazard(node)

    def _hazard(self, node: Node) -> str:
        inputs = node.inputs
        if node.operator in {"Div", "Mod"} and not any(map(self._is_float, inputs)):
            return "" if inputs[1:] and inputs[1] in self.constants else " of integers by computed ones"
        if node.operator == "STFT" and any(inputs[3:]) and inputs[3] not in self.constants:
            return " of a computed length"
        if node.operator in _LAYERS and not any(inputs[_LENGTHS : _LENGTHS + 1]):
            return " without sequence_lens"
        return " in training" if node.operator == "Dropout" and any(inputs[2:]) else ""

    def _is_float(self, name: str) -> bool:
        return self.floats.get(name, False)

    def _float_outputs(self, node: Node) -> Sequence[bool]:
        operator, count = node.operator, len(node.outputs)
        if operator in {"Scan", "If", "Loop"}:
            every = [all(body) for body in zip(*node.bodies, strict=False)]
            return (every[1:] if operator == "Loop" else every) or [False] * count
        if operator in _OTHERS_DIFFER:
            return [self._is_float(node.inputs[0]), *[False] * count] if node.inputs else [False] * count
        return [self._float_output(node)] * count

    def _float_output(self, node: Node) -> bool:
        operator, inputs = node.operator, node.inputs
        if operator == "Cast":
            return node.numbers.get("to") in _FLOATS
        if operator in {"Constant", "ConstantOfShape"}:
            if "value" in node.tensors:
                return _kind(node.tensors["value"]) in _FLOATS
            return operator == "ConstantOfShape"
        if operator in _ALWAYS:
            return True
        if operator in _UNKNOWN or not inputs:
            return False
        if operator in _ALIKE:
            return any(map(self._is_float, inputs))
        which = _TYPED_BY.get(operator, 0)
        return which < len(inputs) and self._is_float(inputs[which])


def _element(type_: int | memoryview) -> int:
    """The element type of a tensor type; 0 if it is not a tensor."""
    found = 0
    for number, part in () if isinstance(type_, int) else fields(type_):
        if number == _TENSOR_TYPE and not isinstance(part, int):
            found = next((value for n, value in _reversed(part) if n == _ELEMENT and isinstance(value, int)), found)
    return found


def _reversed(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields in reverse order, because the last occurrence of a repeated field counts."""
    return reversed([*fields(message)])


def _kind(tensor: memoryview) -> int:
    return next((part for number, part in _reversed(tensor) if number == _DATA_TYPE and isinstance(part, int)), 0)


def _has_minus_one(tensor: memoryview, kind: int) -> bool:
    if kind not in _SIGNED:
        return False
    dtype = np.dtype(_SIGNED[kind])
    ones = 2 ** (8 * dtype.itemsize) - 1
    for number, part in fields(tensor):
        if number == _RAW_DATA and not isinstance(part, int):
            if len(part) % dtype.itemsize or (np.frombuffer(part, dtype) == -1).any():
                return True
        elif number in _INTEGERS and any(value & ones == ones for value in numbers(part)):
            return True
    return False
