"""Alternatives for gather and scatter: kernels around the model's graph, or nodes inside it.

The nodes update the arena in place (input and output share memory), in onnxruntime's own CUDA graph.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from bench.internals.gpu import pytorch
from bench.internals.gpu.engine import inputs, open_engine, some_slots
from bench.internals.gpu.shapes import FEATURES, Shape, bundle_of
from unroll.service.engine.backend import open_cuda
from unroll.service.engine.cuda.device import Device
from unroll.service.engine.tensor_ref import TensorRef

_ARENA = 20_000
#: ScatterND runs one thread per row, so a row is split into this many parts.
_FINE = 256


@dataclass(frozen=True, slots=True)
class Variant:
    """Microseconds on the device, launched back to back. what: how the rows are moved."""

    what: str
    rows: int
    graph: float


def measure(shape: Shape, sizes: list[int], repository: Path, count: int) -> Iterator[Variant]:
    path = bundle_of(shape, repository)
    with open_engine(path, _ARENA, sizes, cells="onnxruntime") as engine:
        for size in sizes:
            graph = engine.graph(size, transfers=False)
            yield Variant(
                "kernels around it", size, pytorch.seconds_per_launch(graph.launch, count, engine.stream) * 1e6
            )
    device = open_cuda("cuda:0")
    model = onnx.load(str(path / "model.onnx"))
    for what, (change, parts) in _CHANGES.items():
        for size in sizes:
            changed = change(onnx.ModelProto.FromString(model.SerializeToString()), parts)
            launch = _bound(changed, device, size, parts)
            yield Variant(what, size, pytorch.seconds_per_launch(launch, count, device.stream) * 1e6)


def _scatter_nd(model: onnx.ModelProto, parts: int) -> onnx.ModelProto:
    graph, width = model.graph, _width(model)
    _constant(graph, "column", [-1, 1])
    _constant(graph, "whole", [-1, width])
    _constant(graph, "part", [-1, width // parts])
    before = [
        helper.make_node("Gather", ["arena", "slots"], ["gathered"], axis=0),
        helper.make_node("Reshape", ["gathered", "whole"], ["state"]),
    ]
    after = [
        helper.make_node("Reshape", ["slots", "column"], ["where"]),
        helper.make_node("Reshape", ["state_out", "part"], ["parts"]),
        helper.make_node("ScatterND", ["arena", "where", "parts"], ["arena_out"]),
    ]
    return _around(model, before, after, width // parts)


def _scatter_elements(model: onnx.ModelProto, parts: int) -> onnx.ModelProto:
    graph, width = model.graph, _width(model)
    _constant(graph, "column", [-1, 1])
    _constant(graph, "row", [1, width])
    before = [helper.make_node("Gather", ["arena", "slots"], ["state"], axis=0)]
    after = [
        helper.make_node("Reshape", ["slots", "column"], ["where"]),
        helper.make_node("Expand", ["where", "row"], ["everywhere"]),
        helper.make_node("ScatterElements", ["arena", "everywhere", "state_out"], ["arena_out"], axis=0),
    ]
    return _around(model, before, after, width)


#: The change to the graph, and the number of parts per row.
_CHANGES: dict[str, tuple[Callable[[onnx.ModelProto, int], onnx.ModelProto], int]] = {
    "Gather and ScatterND": (_scatter_nd, 1),
    f"Gather and ScatterND, rows in {_FINE} parts": (_scatter_nd, _FINE),
    "Gather and ScatterElements": (_scatter_elements, 1),
}


def _around(
    model: onnx.ModelProto, before: list[onnx.NodeProto], after: list[onnx.NodeProto], width: int
) -> onnx.ModelProto:
    graph = model.graph
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    for values, name in ((graph.input, "state"), (graph.output, "state_out")):
        values.remove(next(value for value in values if value.name == name))
    graph.input.append(helper.make_tensor_value_info("arena", TensorProto.FLOAT, ["slots", width]))
    graph.input.append(helper.make_tensor_value_info("slots", TensorProto.INT64, ["parts"]))
    graph.output.append(helper.make_tensor_value_info("arena_out", TensorProto.FLOAT, ["slots", width]))
    return model


def _bound(model: onnx.ModelProto, device: Device, size: int, parts: int) -> Callable[[], object]:
    """Launches onnxruntime's own graph of a step of `size` rows."""
    cuda = {"device_id": "0", "use_tf32": "0", "enable_cuda_graph": "1", "user_compute_stream": str(device.stream)}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=[("CUDAExecutionProvider", cuda)])
    width = next(value.shape[1] for value in session.get_inputs() if value.name == "arena")
    slots = (some_slots(size, _ARENA)[:, None] * parts + np.arange(parts)).reshape(-1)
    memory = {
        "x": device.allocate((size, 1, FEATURES), np.float32),
        "slots": device.allocate(slots.shape, np.int64),
        "arena": device.allocate((_ARENA * parts, width), np.float32),
        "y": device.allocate((size, 1, FEATURES), np.float32),
    }
    device.upload(memory["slots"].pointer, slots)
    device.upload(memory["x"].pointer, inputs(size))
    lens = np.ones(size, np.int32)
    binding = session.io_binding()
    for name in ("x", "slots", "arena"):
        binding.bind_input(name, *_where(memory[name]))
    binding.bind_input("sequence_lens", "cpu", 0, lens.dtype, lens.shape, lens.ctypes.data)
    binding.bind_output("y", *_where(memory["y"]))
    binding.bind_output("arena_out", *_where(memory["arena"]))
    run_options = ort.RunOptions()
    run_options.add_run_config_entry("gpu_graph_id", "1")
    run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def launch() -> object:
        return session.run_with_iobinding(binding, run_options), lens

    for _ in range(3):
        launch()
    return launch


def _where(memory: TensorRef) -> tuple:
    return memory.device_type, memory.device_index, memory.dtype, memory.shape, memory.pointer


def _width(model: onnx.ModelProto) -> int:
    state = next(value for value in model.graph.input if value.name == "state")
    return state.type.tensor_type.shape.dim[1].dim_value


def _constant(graph: onnx.GraphProto, name: str, values: list[int]) -> None:
    graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
