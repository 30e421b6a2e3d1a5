"""Converts the lifted model to an ONNX graph, dynamic in batch and time: one node per layer, one Scan per loop."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import attrgetter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import onnx
import onnx_ir
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
    _finish(program.model)
    model = program.model_proto
    _check(model, traced)
    return model, suspects


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


def _add_lengths(graph: onnx_ir.Graph, layer: onnx_ir.Node) -> None:
    """Add `sequence_lens` to a layer that a loop calls in each step: without it, onnxruntime crashes on no rows."""
    tape, x = onnx_ir.tape.Tape(), layer.inputs[0]
    time, batch = (tape.op("Shape", [x], {"start": axis, "end": axis + 1}) for axis in (0, 1))
    lens = tape.op("Cast", [tape.op("Expand", [time, batch])], {"to": onnx_ir.DataType.INT32})
    for number, node in enumerate(tape.nodes):
        node.outputs[0].name = f"{layer.outputs[0].name}_lengths_{number}"
    graph.insert_before(layer, tape.nodes)
    layer.replace_input_with(4, lens)


def _finish(model: onnx_ir.Model) -> None:
    """Give values their public names, and remove what the exporter wrote but a graph does not need.

    These are copies, unused constants, and metadata (stack traces, local paths): equal models have equal bytes.
    """
    bare: list[Any] = [model]
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in graph:
            # The exporter splits the state of unidirectional layers into one part.
            copied = node.inputs[0] if node.op_type == "Split" and len(node.outputs) == 1 else None
            if copied is not None and not node.outputs[0].is_graph_output():
                node.outputs[0].replace_all_uses_with(copied)
                graph.remove(node, safe=True)
            if node.op_type in {"GRU", "LSTM"} and node.inputs[4:5] == (None,):
                _add_lengths(graph, node)
        for name, constant in [*graph.initializers.items()]:
            if not constant.uses() and not constant.is_graph_output():
                graph.initializers.pop(name)
        values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        for value in values:
            if value.name:
                is_public = value.name.startswith(_PUBLIC)
                value.name = value.name.removeprefix(_PUBLIC) if is_public else f"/{value.name}"
            if not value.is_graph_input() and not value.is_graph_output():
                value.type = value.shape = None
        bare += [graph, *graph, *values, *(value.const_value for value in graph.initializers.values())]
        for node in graph:
            node.name = None
    for item in bare:
        item.metadata_props.clear()
        item.doc_string = None
