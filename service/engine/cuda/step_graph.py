"""Splits a bundle's graph into its LSTM and GRU layers and the rest. Only this file of the service needs `onnx`.

Export's graphs split the state row into the layers' initial states and join it from their final states. With one time
step, there is often only a change of shape between two layers.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference
from onnx.utils import Extractor

from unroll.bundle import Manifest
from unroll.service.engine.cuda.parts import Layer, NotSeparable, Segment

#: With one time step, these operators change a tensor's shape but not the order of values.
_RESHAPING = {"Squeeze", "Unsqueeze", "Identity", "Transpose", "Split", "Flatten"}
_SUPPORTED = {
    "LSTM": {"hidden_size", "direction", "input_forget", "layout"},
    "GRU": {"hidden_size", "direction", "linear_before_reset", "layout"},
}


def take_apart(model: bytes, manifest: Manifest) -> list[Layer | Segment]:
    """Return the parts in execution order. Raises NotSeparable."""
    return list(_Graph(shape_inference.infer_shapes(onnx.load_from_string(model)), manifest).parts())


class _Graph:
    def __init__(self, model: onnx.ModelProto, manifest: Manifest) -> None:
        self._model = model
        self._manifest = manifest
        self._nodes = list(model.graph.node)
        self._maker = {name: node for node in self._nodes for name in node.output if name}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._values = {
            value.name: value for value in (*model.graph.input, *model.graph.value_info, *model.graph.output)
        }
        self._extractor = Extractor(model)

    def parts(self) -> Iterator[Layer | Segment]:
        known = {spec.name for spec in self._manifest.inputs}
        covered = 0
        for node in self._nodes:
            if node.op_type == "RNN":
                raise NotSeparable("it has an RNN layer")
            if node.op_type in _SUPPORTED:
                layer = self._layer(node, known)
                if layer.x not in known:
                    yield self._segment(known, [layer.x])
                    known.add(layer.x)
                yield layer
                known.add(layer.y)
                covered += layer.hidden * (2 if layer.cell == "LSTM" else 1)
        if covered != self._manifest.state_size:
            raise NotSeparable("its state is not that of LSTM and GRU layers alone")
        yield self._segment(known, [spec.name for spec in self._manifest.outputs])

    def _layer(self, node: onnx.NodeProto, known: set[str]) -> Layer:
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        lstm = node.op_type == "LSTM"
        plain = (
            attributes.keys() <= _SUPPORTED[node.op_type]
            and attributes.get("direction", b"forward") == b"forward"
            and not attributes.get("input_forget")
            and not attributes.get("layout")
            and (lstm or attributes.get("linear_before_reset") == 1)
            and len(node.input) == (7 if lstm else 6)
        )
        if not plain:
            raise NotSeparable(f"one of its layers is not a plain {node.op_type}")
        source = self._source(node.input[0])
        x = source if source in known else node.input[0]
        w, r, b = (self._constant(name) for name in node.input[1:4])
        return Layer(
            "LSTM" if lstm else "GRU",
            x,
            node.output[0],
            w[0],
            r[0],
            b[0],
            self._offset(node.input[5], node.output[1]),
            self._offset(node.input[6], node.output[2]) if lstm else 0,
            bounded=x in self._maker and self._maker[x].op_type in _SUPPORTED,
        )

    def _source(self, name: str) -> str:
        """Return the tensor that has the same values, maybe in another shape."""
        while (node := self._maker.get(name)) is not None and node.op_type in _RESHAPING and len(node.output) == 1:
            if node.op_type == "Transpose" and list(node.attribute[0].ints) != [1, 0, 2]:
                break
            name = node.input[0]
        return name

    def _offset(self, before: str, after: str) -> int:
        """Return the offset of a layer's initial state in the row. Its final state must go to that offset only."""
        begin = self._source(before)
        offset, size = self._in_row(begin)
        if self._to_row.get(after) != (offset, size):
            raise NotSeparable("a layer's state is changed, or used by another node, between the rows")
        return offset

    def _in_row(self, name: str) -> tuple[int, int]:
        width = self._manifest.state_size
        if name == "state":
            return 0, width
        node = self._maker.get(name)
        if node is None or node.op_type != "Split" or node.input[0] != "state":
            raise NotSeparable("a layer does not begin with a part of the state row")
        sizes = self._constant(node.input[1]).tolist()
        index = list(node.output).index(name)
        return sum(sizes[:index]), sizes[index]

    @cached_property
    def _to_row(self) -> dict[str, tuple[int, int]]:
        """Offset and size in `state_out` of each tensor that is joined into it and used nowhere else."""
        last = self._source("state_out")
        node = self._maker[last]
        ends = list(node.input) if node.op_type == "Concat" else [last]
        sizes = [slot.size for slot in self._manifest.state]
        if len(ends) != len(sizes):
            raise NotSeparable("the state row is not joined from the layers' states")
        found, offset = {}, 0
        for end, size in zip(ends, sizes, strict=True):
            found[self._only_source(end)] = (offset, size)
            offset += size
        return found

    def _only_source(self, name: str) -> str:
        """Return `_source`. Raises NotSeparable if another node uses a tensor on the way."""
        begin = self._source(name)
        while True:
            if name != "state_out" and sum(list(node.input).count(name) for node in self._nodes) > 1:
                raise NotSeparable("another node uses a layer's final state")
            if name == begin:
                return begin
            name = self._maker[name].input[0]

    def _segment(self, known: set[str], outputs: list[str]) -> Segment:
        """Return the part of the graph that computes `outputs` from the known tensors."""
        inputs: dict[str, str] = {}
        seen: set[str] = set()
        waiting = list(outputs)
        while waiting:
            name = waiting.pop()
            if not name or name in seen or name in self._constants:
                continue
            seen.add(name)
            source = self._source(name)
            if source in known and name not in outputs:
                inputs[name] = source
                continue
            node = self._maker.get(name)
            if node is None or node.op_type in _SUPPORTED:
                raise NotSeparable(f"{outputs[0]!r} depends on {name!r}, a state or the length of a row")
            waiting += node.input
        model = self._extractor.extract_model(sorted(inputs), outputs)
        shapes = {name: self._shape(name) for name in (*inputs, *outputs)}
        return Segment(model.SerializeToString(), inputs, outputs, shapes)

    def _shape(self, name: str) -> tuple[int, ...]:
        batch, time = self._dimensions(self._manifest.inputs[0].name)[:2]
        shape = [{batch: -1, time: 1}.get(each, each) for each in self._dimensions(name)]
        if not all(isinstance(each, int) and each for each in shape):
            raise NotSeparable(f"the shape of {name!r} is not known")
        return tuple(int(each) for each in shape)

    def _dimensions(self, name: str) -> list[str | int]:
        dimensions = self._values[name].type.tensor_type.shape.dim
        return [each.dim_param or each.dim_value for each in dimensions]

    def _constant(self, name: str) -> np.ndarray:
        if name not in self._constants:
            raise NotSeparable("a layer's weights are computed")
        return numpy_helper.to_array(self._constants[name])
