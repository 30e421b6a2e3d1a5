"""The lifted model as an ONNX graph: one LSTM, GRU or RNN node per layer, batch and time dynamic."""

from collections.abc import Iterator
from typing import Any

import onnx
import onnxruntime
import torch
from onnxscript import opset20 as op

from unroll.bundle import CRASHING_OPTIMIZERS
from unroll.bundle.golden import Arrays, RunFunction
from unroll.export.errors import ExportError, first_line
from unroll.export.lifting.state_row import Layout
from unroll.export.lifting.streaming import StreamingModule
from unroll.export.log_filter import quiet
from unroll.export.signature.samples import as_tensors
from unroll.export.tracing import Suspects, trace

OPSET = 20

#: Marks the graph's own inputs and outputs until the names inside are out of their way.
_PUBLIC = "public:"

#: Nodes that hand an integer on unchanged, as far as the row of an embedding goes.
_TRANSPARENT = {"Cast", "Identity", "Unsqueeze", "Squeeze", "Transpose", "Reshape", "Flatten", "Round"}


def to_onnx(module: StreamingModule, inputs: Arrays) -> tuple[onnx.ModelProto, Suspects]:
    """Trace `module` with `inputs`, each (batch, time, ...); also returns the sizes at which the graph may be wrong.

    Raises ExportError(not_exportable).
    """
    tensors = as_tensors(inputs, double=False)
    size, time = next(iter(inputs.values())).shape[:2]
    arguments = (torch.zeros(size, module.layout.size), torch.full((size,), time, dtype=torch.int32), *tensors.values())
    inputs_of_graph = ["state", "sequence_lens", *module.names]
    outputs_of_graph = [*(output.spec.name for output in module.outputs), "state_out"]
    with quiet():
        try:
            traced, suspects = trace(module, arguments)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=OPSET,
                input_names=[_PUBLIC + name for name in inputs_of_graph],
                output_names=[_PUBLIC + name for name in outputs_of_graph],
                custom_translation_table={
                    torch.ops.unroll.lstm.default: _lstm,
                    torch.ops.unroll.gru.default: _gru,
                    torch.ops.unroll.rnn.default: _rnn,
                    torch.ops.unroll.cat.default: _cat,
                },
                verbose=False,
                external_data=False,
            )
        except ExportError:
            raise
        except Exception as error:
            _leave_vmap()
            raise ExportError("not_exportable", f"torch.export cannot follow forward: {first_line(error)}") from error
    assert program is not None
    model = program.model_proto
    _rename(model.graph)
    _drop_copies(model.graph)
    return _bare(model), suspects


def _leave_vmap() -> None:
    """A failed trace may stay within torch.vmap, where PyTorch refuses much."""
    while torch._C._functorch.maybe_current_level() is not None:
        torch._C._functorch._vmap_decrement_nesting()


def _rename(graph: onnx.GraphProto) -> None:
    """Free the names that inputs and outputs shall have: the exporter may have used them inside."""

    def renamed(name: str) -> str:
        return name.removeprefix(_PUBLIC) if name.startswith(_PUBLIC) or not name else f"/{name}"

    for value in [*graph.input, *graph.output, *graph.initializer, *graph.value_info]:
        value.name = renamed(value.name)
    for node in graph.node:
        node.input[:] = map(renamed, node.input)
        node.output[:] = map(renamed, node.output)
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                _rename(inner)


def _drop_copies(graph: onnx.GraphProto) -> None:
    """A Split into one part, as the exporter writes for the state of a layer with one direction, copies a tensor."""
    kept = {value.name for value in graph.output}
    copies: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Split" and len(node.output) == 1 and node.output[0] not in kept:
            copies[node.output[0]] = copies.get(node.input[0], node.input[0])
    for node in graph.node:
        node.input[:] = [copies.get(name, name) for name in node.input]
    nodes = [node for node in graph.node if not copies.keys() & set(node.output)]
    del graph.node[:]
    graph.node.extend(nodes)


def index_limits(model: onnx.ModelProto, layout: Layout) -> dict[str, int]:
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


def onnx_runner(model: bytes, module: StreamingModule) -> RunFunction:
    """The graph on onnxruntime's CPU provider, as the bundle's run function, which raises ExportError(parity)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=CRASHING_OPTIMIZERS
        )
    except Exception as error:
        raise ExportError("not_exportable", f"onnxruntime cannot load the graph: {first_line(error)}") from error
    names = [output.spec.name for output in module.outputs]

    def run(inputs: Arrays, state: Any, sequence_lens: Any) -> tuple[Arrays, Any]:
        feeds = inputs | {"state": state, "sequence_lens": sequence_lens}
        try:
            *outputs, after = session.run([*names, "state_out"], feeds)
        except Exception as error:
            size = f"{len(state)} sequences of {max(sequence_lens)} time steps"
            raise ExportError(
                "parity", f"onnxruntime fails on {size}, PyTorch does not: {first_line(error)}"
            ) from error
        return dict(zip(names, outputs, strict=True)), after

    return run


def _lstm(x: Any, lens: Any, h: Any, c: Any, w: Any, r: Any, b: Any) -> Any:
    y, h_out, c_out = op.LSTM(x, w, r, b, lens, h, c, **_shape_of(h))
    return _joined(y, h), h_out, c_out


def _gru(x: Any, lens: Any, h: Any, w: Any, r: Any, b: Any) -> Any:
    # linear_before_reset=1 is torch's (and cuDNN's) GRU; ONNX's default is another function.
    y, h_out = op.GRU(x, w, r, b, lens, h, **_shape_of(h), linear_before_reset=1)
    return _joined(y, h), h_out


def _rnn(x: Any, lens: Any, h: Any, w: Any, r: Any, b: Any, activation: str) -> Any:
    # onnxruntime's RNN, unlike its LSTM and GRU, rounds a batch of one in another way than a larger one. With the
    # first row twice there never is a batch of one, and a row's bits do not depend on its company.
    x, lens, rows = _first_twice(x, 1), _first_twice(lens, 0), _first_twice(h, 1)
    y, h_out = op.RNN(x, w, r, b, lens, rows, **_shape_of(h), activations=[activation] * h.shape[0])
    return _joined(_without_last(y, 2), h), _without_last(h_out, 1)


def _cat(tensors: Any, axis: int) -> Any:
    return op.Concat(*tensors, axis=axis)


def _first_twice(tensor: Any, axis: int) -> Any:
    return op.Concat(tensor, op.Slice(tensor, _ints(0), _ints(1), _ints(axis)), axis=axis)


def _without_last(tensor: Any, axis: int) -> Any:
    return op.Slice(tensor, _ints(0), _ints(-1), _ints(axis))


def _shape_of(h: Any) -> dict[str, Any]:
    return {"hidden_size": h.shape[2], "direction": "bidirectional" if h.shape[0] == 2 else "forward"}


def _joined(y: Any, h: Any) -> Any:
    """(time, directions, batch, hidden) -> (time, batch, directions * hidden)."""
    if h.shape[0] == 1:
        return op.Squeeze(y, _ints(1))
    return op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), _ints(0, 0, -1))


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the exporter's notes (stack traces, local paths), so that equal models have equal bytes."""
    graph = model.graph
    for item in [model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info]:
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.value_info[:]
    for node in graph.node:
        node.name = ""
    return model
