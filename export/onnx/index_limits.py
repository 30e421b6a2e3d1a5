"""Finds the integer inputs that index an embedding: they must be below the number of its rows."""

from collections.abc import Iterator

import onnx

from unroll.export.errors import ExportError
from unroll.export.lifting.state_row import Layout
from unroll.export.signature.samples import Samples

#: Nodes that hand an integer on unchanged, as far as the row of an embedding goes.
_TRANSPARENT = {"Cast", "Identity", "Unsqueeze", "Squeeze", "Transpose", "Reshape", "Flatten", "Round"}


def _index_limits(model: onnx.ModelProto, layout: Layout) -> dict[str, int]:
    """For each integer input that indexes an embedding, static ones included: the number of its rows."""
    graphs = [model.graph, *_bodies(model.graph)]
    rows = {tensor.name: tensor.dims[0] for graph in graphs for tensor in graph.initializer if tensor.dims}
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in (node for graph in graphs for node in graph.node):
        for name in node.input:
            consumers.setdefault(name, []).append(node)

    def limits(name: str) -> Iterator[int]:
        for node in consumers.get(name, []):
            if node.op_type in _TRANSPARENT and node.input[0] == name:
                yield from limits(node.output[0])
            elif node.op_type == "Gather" and node.input[1] == name and _is_embedding(node, rows):
                yield rows[node.input[0]]
            elif node.op_type == "Scan":
                (body,) = (attribute.g for attribute in node.attribute if attribute.name == "body")
                yield from limits(body.input[list(node.input).index(name)].name)

    found = {value.name: list(limits(value.name)) for value in model.graph.input if value.name != "sequence_lens"}
    splits = (node.output for node in model.graph.node if node.op_type == "Split" and node.input[0] == "state")
    pieces = next(splits, ["state"])
    for slot, piece in zip(layout.slots, pieces, strict=False):
        if slot.kind == "static":
            found[slot.module.removeprefix("input ")] = list(limits(piece))
    return {name: min(values) for name, values in found.items() if values}


def _bodies(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """The graphs inside a graph: what its scans run."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [each for body in inner for each in (body, *_bodies(body))]


def _is_embedding(node: onnx.NodeProto, rows: dict[str, int]) -> bool:
    return node.input[0] in rows and all(attribute.i == 0 for attribute in node.attribute if attribute.name == "axis")


def input_limits(graph: onnx.ModelProto, layout: Layout, samples: Samples) -> dict[str, int]:
    """For each integer input that indexes an embedding: the number of its rows, below which its values must be.

    Raises:
        ExportError: input, where neither an embedding nor the example gives more than one value to try.
    """
    given = samples.example | samples.static
    integers = {name: array for name, array in given.items() if array.dtype.kind == "i"}
    limits = _index_limits(graph, layout)
    for name, array in integers.items():
        if name not in limits and (array == array.flat[0]).all():
            raise ExportError(
                "input",
                f"the example of {name!r} holds one value only; give an example with all values that it may have",
            )
    return {name: limit for name, limit in limits.items() if name in integers}
