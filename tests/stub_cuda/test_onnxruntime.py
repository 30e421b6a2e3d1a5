"""onnxruntime-gpu on exported graphs: placement of nodes, launches and copies of a step, contents of a capture.

Uses the real provider over a CUDA that only logs its calls; see `cuda.c`.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import onnx
import pytest
from served_models import models
from stub_cuda.calls import Call, Calls
from stub_cuda.child import Outcome

RunWithStub = Callable[..., Outcome]

EXAMPLES = Path(__file__).parents[2] / "examples" / "repository"

IMPORTS = """
import json
from sys import argv
from threading import Thread
from stub_cuda.step import Step, new_stream, phase
"""


def model(name: str) -> Path:
    """Return the graph of an example or of a `served_models` model."""
    folder = name.replace(" ", "-").replace(",", "")
    return next(path for path in (EXAMPLES, models.BUNDLES) if (path / folder).exists()) / folder / "1" / "model.onnx"


def without_lens(path: Path, tmp_path: Path) -> Path:
    """Write the graph without row lengths, as for calls of single steps."""
    graph = onnx.load(path)
    for node in graph.graph.node:
        if node.op_type in ("LSTM", "GRU"):
            node.input[4] = ""
    graph.graph.input.remove(next(given for given in graph.graph.input if given.name == "sequence_lens"))
    onnx.save(graph, tmp_path / "step.onnx")
    return tmp_path / "step.onnx"


def sources(calls: Iterable[Call]) -> set[int]:
    return {call.source for call in calls}


def uploads(calls: Calls) -> list[int]:
    """Return the bytes of each copy to the device."""
    return [call.bytes for call in calls.crossings if call.destination == "device"]


# Placement of nodes.


@pytest.mark.parametrize(
    "name", ["co2", "bytes", "lstm 2", "gru 2", "embedding, LSTM, norm, GRU", "several outputs in a dict"]
)
def test_every_node_is_on_the_device(run_with_stub: RunWithStub, name: str) -> None:
    script = """
step = Step(argv[1])
phase("step")
step.run()
print(json.dumps(step.session.get_providers()))
"""
    ran = run_with_stub(IMPORTS + script, model(name))
    assert ran.result[0] == "CUDAExecutionProvider"
    recurrent = [node for node in onnx.load(model(name)).graph.node if node.op_type in ("LSTM", "GRU")]
    assert len(ran.phases["step"].named("cudnnRNNForward")) == len(recurrent)


def test_arithmetic_on_shapes_is_not_and_costs_nothing(run_with_stub: RunWithStub) -> None:
    """A node on the CPU is therefore not always a reason to refuse a model."""
    with pytest.raises(AssertionError, match="assigned to the default CPU EP"):
        run_with_stub(IMPORTS + "Step(argv[1])", model("matrices as steps"))
    script = """
step = Step(argv[1], stream=new_stream(), fallback=True)
step.run()
phase("step")
step.capture()
phase("end")
"""
    calls = run_with_stub(IMPORTS + script, model("matrices as steps")).phases["step"]
    assert len(calls.crossings) == len(calls.named("cudnnRNNForward"))


@pytest.mark.parametrize("name", ["rnn tanh", "rnn relu"])
def test_plain_rnns_go_by_the_host(run_with_stub: RunWithStub, name: str) -> None:
    """onnxruntime has no such kernel for relu; for tanh the exporter cuts `sequence_lens` up on the device."""
    script = """
step = Step(argv[1], stream=new_stream(), fallback=True)
step.run()
phase("step")
try:
    step.capture()
except RuntimeError:
    phase("end")
"""
    calls = run_with_stub(IMPORTS + script, model(name)).phases["step"]
    assert "cudaEventSynchronize" in calls.forbidden
    assert calls.crossings


# The cost of a step.


@pytest.mark.parametrize("name", ["co2", "bytes", "lstm 2"])
@pytest.mark.parametrize("steps", [1, 7])
def test_state_never_crosses_to_the_host(run_with_stub: RunWithStub, name: str, steps: int) -> None:
    script = """
step = Step(argv[1])
step.use(8, steps=int(argv[2]))
step.run()
phase("step")
step.run()
phase("end")
"""
    calls = run_with_stub(IMPORTS + script, model(name), steps).phases["step"]
    assert uploads(calls) == [8 * 4] * len(calls.named("cudnnRNNForward"))  # the lengths, once per layer
    assert len(calls.crossings) == len(uploads(calls))
    assert not calls.named("cudaMalloc", "cudaMallocHost", "cudaHostAlloc", "cudaFree", "cudaFreeHost")


@pytest.mark.parametrize(("kind", "each", "besides"), [("lstm", 4, 6), ("gru", 3, 6)])
def test_launches_of_a_step(run_with_stub: RunWithStub, kind: str, each: int, besides: int) -> None:
    """A layer: its lengths, the cell, and each part of its new state taken from the node's output."""
    script = """
step = Step(argv[1], stream=new_stream())
step.run()
phase("step")
step.capture()
phase("end")
"""
    for layers in (1, 2, 4):
        launches = run_with_stub(IMPORTS + script, model(f"{kind} {layers}")).phases["step"].captured
        assert len(launches) <= each * layers + besides


# A graph that the owner of the stream captures around a run.

CAPTURE = """
step = Step(argv[1], stream=new_stream())
phase("warm-up")
step.run()
phase("eager")
step.run()
phase("capture")
graph = step.capture()
phase("launch")
step.launch(graph)
phase("later")
for _ in range(3):
    step.run()
    step.run(wait=False)
step.use(64, steps=5)
step.run()
phase("end")
"""


@pytest.mark.parametrize("lens", [False, True])
@pytest.mark.parametrize("name", ["co2", "bytes", "lstm 2", "embedding, LSTM, norm, GRU"])
def test_a_run_can_be_captured(run_with_stub: RunWithStub, tmp_path: Path, name: str, lens: bool) -> None:
    path = model(name) if lens else without_lens(model(name), tmp_path)
    phases = run_with_stub(IMPORTS + CAPTURE, path).phases
    captured = phases["capture"].captured
    assert not phases["capture"].forbidden
    assert not phases["capture"].waits
    assert not captured.named("cudaLaunchHostFunc")  # it would free the same memory at every launch
    eager = [(call.name, call.kernel, call.bytes) for call in phases["eager"].queued]
    assert [(call.name, call.kernel, call.bytes) for call in captured] == eager[: len(captured)]
    assert [call.name for call in phases["launch"]] == ["cudaGraphLaunch"]


@pytest.mark.parametrize("name", ["co2", "embedding, LSTM, norm, GRU"])
def test_host_memory_read_by_the_graph_does_not_change(run_with_stub: RunWithStub, name: str) -> None:
    """Every launch reads the lengths, and the address tables for Split and Concat, again."""
    phases = run_with_stub(IMPORTS + CAPTURE, model(name)).phases
    read = [call for call in phases["capture"].captured.crossings if call.destination == "device"]
    assert read
    assert {call.origin for call in read} == {"pinned"}
    assert len(sources(read)) == len(read)
    assert not sources(read) & sources(phases["later"].crossings)
    assert not phases["later"].named("cudaFreeHost")


def test_a_run_that_waits_cannot_be_captured(run_with_stub: RunWithStub) -> None:
    script = """
step = Step(argv[1], stream=new_stream())
step.run()
phase("capture")
try:
    step.capture(wait=True)
except RuntimeError as error:
    print(json.dumps(str(error)))
"""
    ran = run_with_stub(IMPORTS + script, model("co2"))
    assert "forbidden while a stream captures" in ran.result
    assert "cudaStreamSynchronize" in ran.phases["capture"].forbidden


def test_a_larger_call_than_ever_before_cannot_be_captured(run_with_stub: RunWithStub) -> None:
    script = """
step = Step(argv[1], stream=new_stream())
step.run()
step.use(4096)
phase("capture")
try:
    step.capture()
except RuntimeError as error:
    print(json.dumps(str(error)))
"""
    ran = run_with_stub(IMPORTS + script, model("co2"))
    assert "Failed to allocate memory" in ran.result
    assert "cudaMalloc" in ran.phases["capture"].forbidden


def test_only_a_run_that_waits_returns_its_pinned_memory(run_with_stub: RunWithStub) -> None:
    """Uncaptured work therefore waits. The pinned memory of captures grows until the session ends."""
    script = """
step = Step(argv[1], stream=new_stream())
for wait in (True, False):
    step.run()
    phase(f"wait {wait}")
    for _ in range(5):
        step.run(wait=wait)
    phase("")
"""
    phases = run_with_stub(IMPORTS + script, model("co2")).phases
    layers = 2
    assert len(sources(phases["wait True"].crossings)) == layers
    assert len(sources(phases["wait False"].crossings)) == 5 * layers


def test_an_input_bound_on_the_host_is_copied_when_it_is_bound(run_with_stub: RunWithStub) -> None:
    """No run reads it again, so later writes to it have no effect."""
    script = """
import numpy as np
import onnxruntime as ort
step = Step(argv[1], stream=new_stream())
phase("bind")
step.binding.bind_ortvalue_input("ppm", ort.OrtValue.ortvalue_from_numpy(np.ones((4, 1, 1), np.float32)))
phase("runs")
step.run()
step.run()
phase("end")
"""
    phases = run_with_stub(IMPORTS + script, model("co2")).phases
    assert uploads(phases["bind"]) == [4 * 4]
    assert {call.origin for call in phases["runs"].crossings} == {"pinned"}  # lengths only


# onnxruntime's own graphs.

OWN_GRAPHS = """
step = Step(argv[1], enable_cuda_graph="1")
phase("first")
step.run(graph=1)
phase("next")
step.run(graph=1)
phase("without waiting")
step.run(graph=1, wait=False)
phase("another")
step.use(64)
step.run(graph=2)
phase("the first again")
step.run(graph=1)
phase("none")
step.run(graph=-1)
phase("in a thread")
thread = Thread(target=step.run, kwargs={"graph": 1})
thread.start()
thread.join()
phase("end")
"""


@pytest.fixture(scope="module")
def own_graphs(run_with_stub: RunWithStub) -> dict[str, Calls]:
    return run_with_stub(IMPORTS + OWN_GRAPHS, model("co2")).phases


@pytest.mark.parametrize("phase", ["first", "another"])
def test_onnxruntime_captures_at_the_third_run_and_makes_all_three_at_once(
    own_graphs: dict[str, Calls], phase: str
) -> None:
    """A state that is its own input therefore advances three steps."""
    calls, layers = own_graphs[phase], 2
    assert not calls.forbidden
    assert len(calls.named("cudnnRNNForward")) == 3 * layers
    assert len(calls.captured.named("cudnnRNNForward")) == layers
    assert len(calls.named("cudaGraphLaunch")) == 1


def test_a_later_run_is_one_launch(own_graphs: dict[str, Calls]) -> None:
    waiting = ["cudaGraphLaunch", "cudaStreamSynchronize"]
    assert [call.name for call in own_graphs["next"]] == waiting
    assert [call.name for call in own_graphs["the first again"]] == waiting
    assert [call.name for call in own_graphs["without waiting"]] == waiting[:1]
    assert own_graphs["next"][0].launched == own_graphs["the first again"][0].launched


def test_a_run_may_do_without_a_graph(own_graphs: dict[str, Calls]) -> None:
    assert len(own_graphs["none"].named("cudnnRNNForward")) == 2
    assert not own_graphs["none"].named("cudaGraphLaunch")


def test_onnxruntimes_graphs_belong_to_their_thread(own_graphs: dict[str, Calls]) -> None:
    assert own_graphs["in a thread"].captured


def test_host_memory_read_by_onnxruntimes_graphs_does_not_change(own_graphs: dict[str, Calls]) -> None:
    read = sources(own_graphs["first"].captured.crossings)
    later = own_graphs["another"] + own_graphs["none"] + own_graphs["in a thread"]
    assert read
    assert not read & sources(call for call in later if call.origin == "pinned")
