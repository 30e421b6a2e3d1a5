"""Converts the lifted model to an ONNX graph, dynamic in batch and time: one node per layer, one Scan per loop."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import attrgetter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import onnx
import torch
from onnxscript import TracedOnnxFunction
from onnxscript.rewriter import _ir_utils, _matcher
from torch import fx
from torch.export import ExportedProgram

from unroll.bundle import BundleError
from unroll.bundle.golden import Arrays
from unroll.bundle.graph import check_operators, operators
from unroll.export.errors import ExportError, no_operator, untraceable
from unroll.export.lifting.streaming import StreamingModule
from unroll.export.log_filter import quiet
from unroll.export.onnx.tracing import Suspects, first_node, place_of, trace
from unroll.export.onnx.translation import translation_table
from unroll.export.signature.samples import as_tensors

OPSET = 20

#: The ONNX model, and the sizes at which it may be wrong.
Trace = tuple[onnx.ModelProto, Suspects]

#: Marks the graph's inputs and outputs until conflicting names inside the graph are changed.
_PUBLIC = "public:"

#: Operators of PyTorch that divide.
_DIVISIONS = {"div", "floor_divide", "floordiv", "fmod", "mod", "remainder"}


def to_onnx(module: StreamingModule, inputs: Arrays) -> Trace:
    """Trace `module` with `inputs`, each (batch, time, ...). Raises ExportError(not_exportable)."""
    tensors = as_tensors(inputs, double=False)
    size, time = next(iter(inputs.values())).shape[:2]
    arguments = (torch.zeros(size, module.layout.size), torch.full((size,), time, dtype=torch.int32), *tensors.values())
    inputs_of_graph = ["state", "sequence_lens", *module.names]
    outputs_of_graph = [*(output.spec.name for output in module.outputs), "state_out"]
    traced = None
    with quiet(), unparsed_functions(), _exact_numbers():
        try:
            traced, suspects = trace(module, arguments)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=OPSET,
                input_names=[_PUBLIC + name for name in inputs_of_graph],
                output_names=[_PUBLIC + name for name in outputs_of_graph],
                custom_translation_table=translation_table(),
                verbose=False,
                external_data=False,
            )
        except ExportError:
            raise
        except Exception as error:
            _leave_vmap()
            if first_node(traced, _solves):
                what = f"forward inverts a matrix, or solves for one{place_of(traced, _solves)}"
                raise no_operator(what) from error
            raise untraceable("forward", error, partial(_place, traced)) from error
    assert program is not None
    model = program.model_proto
    _rename(model.graph)
    _drop_copies(model.graph)
    _drop_unused(model.graph)
    _check(model, traced)
    return _bare(model), suspects


def _place(program: ExportedProgram | None, operator: str) -> str:
    """Where forward calls an operator such as `fft_fft`, or one that is built from it; empty if that is unknown."""
    return place_of(program, lambda node: str(node.target).rpartition(".")[0].endswith(operator))


def _check(model: onnx.ModelProto, program: ExportedProgram) -> None:
    """Raise ExportError(not_exportable) for a graph that a server would refuse."""
    try:
        check_operators(operators(model.SerializeToString()), ())
    except BundleError as error:
        place = place_of(program, _divides_integers) if "of integers" in error.message else ""
        how = ": compute in floats, as torch.floor(n.float() / m).long()" if place else ""
        if not place and (place := place_of(program, _rolls)):
            how = ": shift as with torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]"
        raise ExportError(
            "not_exportable", f"a server refuses what forward computes: {error.message}{place}{how}"
        ) from error


def _divides_integers(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "").partition(".")[0]
    made = node.meta.get("val")
    whole = isinstance(made, torch.SymInt) or (isinstance(made, torch.Tensor) and not made.is_floating_point())
    return name in _DIVISIONS and whole and isinstance(node.args[1], fx.Node)


def _solves(node: fx.Node) -> bool:
    return "linalg_" in str(node.target)


def _rolls(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.roll.default


@contextmanager
def _exact_numbers() -> Iterator[None]:
    """Keep onnxscript from taking 0.999995 for 1, and 1e-8 for 0, when it removes operations without effect."""
    exact = SimpleNamespace(isclose=lambda one, other, **tolerances: one == other)
    with mock.patch.object(_matcher, "math", exact), mock.patch.object(_ir_utils, "math", exact):
        yield


def unparsed_functions() -> AbstractContextManager[Any]:
    """Keep onnxscript from parsing the sources of its 500 functions: PyTorch only asks each for its domain."""
    return mock.patch.object(TracedOnnxFunction, "function_ir", property(attrgetter("opset")), create=True)


def _leave_vmap() -> None:
    """Leave torch.vmap: a failed trace may still be inside it, where many operations raise."""
    while torch._C._functorch.maybe_current_level() is not None:
        torch._C._functorch._vmap_decrement_nesting()


def _rename(graph: onnx.GraphProto) -> None:
    """Give inputs and outputs their public names, which the exporter may have used inside the graph."""

    def renamed(name: str) -> str:
        return name.removeprefix(_PUBLIC) if name.startswith(_PUBLIC) or not name else f"/{name}"

    for value in [*graph.input, *graph.output, *graph.initializer, *graph.value_info]:
        value.name = renamed(value.name)
    for node in graph.node:
        node.input[:] = map(renamed, node.input)
        node.output[:] = map(renamed, node.output)
        for inner in _inner_graphs(node):
            _rename(inner)


def _drop_copies(graph: onnx.GraphProto) -> None:
    """Remove Splits into one part, which only copy: the exporter writes them for the state of unidirectional layers."""
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


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Drop constants that the exporter wrote for arguments of operators that we translate."""
    used = _read(graph)
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _read(graph: onnx.GraphProto) -> set[str]:
    """The names that a graph reads or returns, including those of inner graphs."""
    inner = [_read(within) for node in graph.node for within in _inner_graphs(node)]
    return set().union(*(node.input for node in graph.node), (value.name for value in graph.output), *inner)


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the exporter's metadata (stack traces, local paths), so that equal models have equal bytes."""
    del model.metadata_props[:]
    model.doc_string = ""
    _bare_graph(model.graph)
    return model


def _bare_graph(graph: onnx.GraphProto) -> None:
    for item in [graph, *graph.node, *graph.initializer, *graph.input, *graph.output]:
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.value_info[:]
    for node in graph.node:
        node.name = ""
        for inner in _inner_graphs(node):
            _bare_graph(inner)


def _inner_graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The bodies of a Scan or an If."""
    return [graph for a in node.attribute for graph in ([a.g] if a.HasField("g") else a.graphs)]
