"""Checks a graph: it may contain only operators of an allow-list, and must contain all its weights.

Operators are counted in the graph, in its subgraphs (of Scan, Loop and If) and in its functions.
"""

from collections import Counter
from collections.abc import Collection

from unroll.bundle.errors import BundleError
from unroll.bundle.hazards import Node, Scope
from unroll.bundle.protobuf import fields, numbers

# Field numbers of onnx.proto.
_GRAPH, _TRAINING, _FUNCTION = 7, 20, 25  # of a model
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _SPARSE = 1, 5, 11, 12, 15  # of a graph
_FUNCTION_NODE, _FUNCTION_DOMAIN = 7, 10
_INPUTS, _OUTPUTS, _OP_TYPE, _ATTRIBUTE, _DOMAIN = 1, 2, 4, 5, 7  # of a node
_NAME, _NUMBER = 1, 3  # of an attribute
_TENSOR, _SUBGRAPH, _TENSORS, _SUBGRAPHS, _SPARSE_TENSOR, _SPARSE_TENSORS = 5, 6, 10, 11, 22, 23  # of an attribute
_DIMS, _DATA_TYPE, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 9, 13, 14  # of a tensor
_TYPED_DATA = {4, 5, 7, 10, 11}

_DEFAULT_DOMAINS = {"", "ai.onnx"}
_KNOWN_DOMAINS = _DEFAULT_DOMAINS | {"com.microsoft"}
#: Bytes per value, by ONNX's type number; only numeric types.
_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
#: For comparison, export writes some dozen nodes per layer, and the subgraphs of EmbeddingBag are five deep.
_MOST_NODES, _MOST_DEPTH = 20_000, 16

#: Operators that bundles may contain: ONNX's deterministic numeric operators. Random numbers, text, images, optional
#: values and losses are excluded.
ALLOWED = frozenset(
    """
    Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization
    BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Cast CastLike Ceil Celu CenterCropPad Clip
    Col2Im Compress Concat ConcatFromSequence Constant ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh
    CumProd CumSum DFT DepthToSpace DequantizeLinear Det Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp
    Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HammingWindow HannWindow HardSigmoid
    HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul MatMulInteger Max MaxPool MaxUnpool Mean
    MeanVarianceNormalization MelWeightMatrix Min Mish Mod Mul Neg NonZero Not OneHot Or PRelu Pad Pow QLinearConv
    QLinearMatMul QuantizeLinear RMSNormalization RNN Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    ReverseSequence RotaryEmbedding Round STFT Scan ScatterElements ScatterND Selu SequenceAt SequenceConstruct
    SequenceEmpty SequenceErase SequenceInsert SequenceLength Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
    Softplus Softsign SpaceToDepth Split SplitToSequence Sqrt Squeeze Sub Sum Swish Tan Tanh TensorScatter
    ThresholdedRelu Tile TopK Transpose Trilu Unique Unsqueeze Where Xor com.microsoft.DynamicQuantizeLSTM
    com.microsoft.DynamicQuantizeMatMul com.microsoft.MatMulIntegerToFloat
    """.split()  # noqa: SIM905 a list of 150 quoted words is no easier to read
)


def operators(model: bytes) -> dict[str, int]:
    """Count the operators of a graph.

    Args:
        model: Content of an ONNX file.

    Returns:
        Counts by operator, the most frequent first. An operator outside ONNX's own domain is named `domain.Name`.

    Raises:
        BundleError: `bundle_graph`, `bundle_too_large` or `bundle_external_data`: it is not a numeric ONNX model that
            contains its weights.
    """
    try:
        found = _Walk().model(model)
    except ValueError as error:
        raise BundleError("bundle_graph", f"model.onnx: {error}") from error
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def check_operators(found: Collection[str], allowed: Collection[str]) -> None:
    """Raises BundleError (`bundle_operator`) for an operator that is neither in the allow-list nor in `allowed`."""
    if foreign := sorted(name for name in found if name not in ALLOWED and name not in allowed):
        names = ", ".join(name[:80] for name in foreign[:5])
        raise BundleError("bundle_operator", f"its graph has operators that are not allowed: {names}")


class _Walk:
    """Walks through an untrusted model once."""

    def __init__(self) -> None:
        self._nodes = 0
        self._found: Counter[str] = Counter()

    def model(self, content: bytes) -> Counter[str]:
        graphs = 0
        for number, part in fields(memoryview(content)):
            if number == _GRAPH:
                graphs += 1
                self._graph(_message(part), Scope(), 0)
            elif number == _FUNCTION:
                self._function(_message(part))
            elif number == _TRAINING:
                raise ValueError("it contains training instructions")
        if graphs != 1:
            raise ValueError(f"not an ONNX model: it has {graphs} graphs")
        return self._found

    def _function(self, function: memoryview) -> None:
        domains = [str(_message(part), "utf-8") for number, part in fields(function) if number == _FUNCTION_DOMAIN]
        if not domains or not _KNOWN_DOMAINS.isdisjoint(domains):
            raise ValueError("a function replaces an operator")
        self._nodes_of(function, _FUNCTION_NODE, Scope(), 0)

    def _graph(self, graph: memoryview, scope: Scope, depth: int) -> list[bool]:
        """Walk through a graph. Returns which outputs are floats. scope: of the enclosing graph."""
        if depth > _MOST_DEPTH:
            raise BundleError("bundle_too_large", f"model.onnx nests graphs deeper than {_MOST_DEPTH}")
        scope, outputs = scope.inner(), []
        for number, part in fields(graph):
            if number == _INITIALIZER:
                _check_tensor(_message(part))
                scope.add_constant(_message(part))
            elif number == _INPUT:
                scope.add_value(_message(part))
            elif number == _OUTPUT:
                outputs.append(_message(part))
            elif number == _SPARSE:
                raise ValueError("it holds a sparse tensor")
        self._nodes_of(graph, _NODE, scope, depth)
        return [scope.floats[scope.add_value(output)] for output in outputs]

    def _nodes_of(self, message: memoryview, node: int, scope: Scope, depth: int) -> None:
        for number, part in fields(message):
            if number == node:
                self._nodes += 1
                if self._nodes > _MOST_NODES:
                    raise BundleError("bundle_too_large", f"model.onnx has more than {_MOST_NODES} nodes")
                self._found[scope.add_node(self._node(_message(part), scope, depth))] += 1

    def _node(self, message: memoryview, scope: Scope, depth: int) -> Node:
        node, name, domain = Node(), "", ""
        for number, part in fields(message):
            if number == _OP_TYPE:
                name = str(_message(part), "utf-8")
            elif number == _DOMAIN:
                domain = str(_message(part), "utf-8")
            elif number in {_INPUTS, _OUTPUTS}:
                (node.inputs if number == _INPUTS else node.outputs).append(str(_message(part), "utf-8"))
            elif number == _ATTRIBUTE:
                self._attribute(node, _message(part), scope, depth)
        node.operator = name if domain in _DEFAULT_DOMAINS else f"{domain}.{name}"
        return node

    def _attribute(self, node: Node, attribute: memoryview, scope: Scope, depth: int) -> None:
        name, tensor, number_ = "", None, None
        for number, part in fields(attribute):
            if number == _NAME:
                name = str(_message(part), "utf-8")
            elif number == _NUMBER and isinstance(part, int):
                number_ = part
            elif number in {_SUBGRAPH, _SUBGRAPHS}:
                node.bodies.append(self._graph(_message(part), scope, depth + 1))
            elif number in {_TENSOR, _TENSORS}:
                _check_tensor(_message(part))
                if tensor is not None and number == _TENSOR:
                    raise ValueError("an attribute holds two tensors")
                tensor = _message(part)
            elif number in {_SPARSE_TENSOR, _SPARSE_TENSORS}:
                raise ValueError("it holds a sparse tensor")
        if name in node.tensors or name in node.numbers:
            raise ValueError("a node has an attribute twice")
        if tensor is not None:
            node.tensors[name] = tensor
        if number_ is not None:
            node.numbers[name] = number_


def _message(part: int | memoryview) -> memoryview:
    if isinstance(part, int):
        raise ValueError("not an ONNX model: a number in place of a message")
    return part


def _check_tensor(tensor: memoryview) -> None:
    count, kind, raw, typed = 1, 0, None, 0
    for number, part in fields(tensor):
        if number == _DIMS:
            for size in numbers(part):
                count *= size
        elif number == _DATA_TYPE and isinstance(part, int):
            kind = part
        elif number == _RAW_DATA:
            raw = len(_message(part))
        elif number in _TYPED_DATA:
            typed += 1 if isinstance(part, int) else len(part)
        elif number == _EXTERNAL_DATA or (number == _DATA_LOCATION and part):
            raise BundleError("bundle_external_data", "its graph keeps weights in other files")
    if kind not in _BYTES:
        raise ValueError(f"it contains a tensor of type {kind}, which is not numeric")
    if (count > typed) if raw is None else (count * _BYTES[kind] != raw):
        raise ValueError("it contains a tensor with more or fewer values than its shape requires")
