"""The CUDA calls of the engine, with the real provider and the real driver bindings over the stub."""

from pathlib import Path

import pytest
from stub_cuda.calls import Calls
from stub_cuda.child import Outcome

from unroll import bundle

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")

SCRIPT = """
import json
from pathlib import Path
from sys import argv
import numpy as np
import stub_cuda.bindings
from stub_cuda.step import phase
from unroll import bundle
from unroll.service.engine.engine import PlainRows
from unroll.service.engine.cuda.driver import Cuda
from unroll.service.engine.cuda.cuda_engine import CudaEngine
from unroll.service.engine.runner import Runner

found = bundle.read(Path(argv[1]))
device = Cuda(0)
runner = Runner(found.model, found.manifest, device.name, stream=device.stream)

def rows(count, steps=1):
    inputs = tuple(np.zeros((count, steps, *spec.shape), spec.numpy) for spec in found.manifest.inputs)
    return PlainRows(inputs, [steps] * count, [0] * count, [*range(2, 2 + count)])

phase("start")
engine = CudaEngine(device, runner, found.manifest, 600, (1, 4, 512))
phase("step")
engine.run(rows(3))
phase("sequence")
engine.run(rows(3, steps=9))
engine.run(rows(500, steps=9))
phase("read")
engine.read(2)
phase("copy")
engine.copy(2, 3)
phase("end")
print(json.dumps({"captured": engine.captured}))
"""


@pytest.fixture(scope="module", params=["lstm", "gru", "two", "tokens"])
def manifest(request: pytest.FixtureRequest, repository: Path) -> bundle.Manifest:
    return bundle.read(repository / request.param / "1").manifest


@pytest.fixture(scope="module")
def ran(run_with_stub, repository: Path, manifest: bundle.Manifest) -> Outcome:
    return run_with_stub(SCRIPT, repository / manifest.name / manifest.version)


@pytest.fixture
def phases(ran: Outcome) -> dict[str, Calls]:
    return ran.phases


def test_nothing_that_a_capture_forbids_is_called_in_one(ran: Outcome, phases: dict[str, Calls]) -> None:
    assert ran.result == {"captured": True}
    assert not phases["start"].forbidden
    assert not phases["start"].captured.named("cudaLaunchHostFunc")


def test_a_graph_takes_the_rows_calls_the_model_and_puts_them_back(phases: dict[str, Calls]) -> None:
    captured = phases["start"].captured
    graphs = sorted({call.graph for call in captured})
    assert len(graphs) % 3 == 0  # buckets
    for graph in graphs:
        calls = [call for call in captured if call.graph == graph]
        assert [calls[0].kernel, calls[-1].kernel] == ["gather", "commit"]
        assert any(call.name == "cudnnRNNForward" for call in calls)


def test_a_step_is_one_launch_and_one_wait(phases: dict[str, Calls]) -> None:
    assert [call.name for call in phases["step"]] == ["cudaGraphLaunch", "cudaEventRecord", "cudaEventSynchronize"]


def test_state_is_copied_to_the_host_only_when_read(phases: dict[str, Calls], manifest: bundle.Manifest) -> None:
    sequences = 2
    crossings = phases["sequence"].crossings
    ours = [call for call in crossings if call.origin == "host" or call.destination == "host"]
    assert len(ours) == sequences * (len(manifest.inputs) + len(manifest.outputs))
    assert [call.bytes for call in phases["read"].crossings] == [4 * manifest.state_size]
    assert not phases["copy"].crossings


def test_host_memory_read_by_the_graphs_does_not_change(phases: dict[str, Calls]) -> None:
    read = [call.source for call in phases["start"].captured.crossings]
    assert len(set(read)) == len(read)
    assert not set(read) & {call.source for call in phases["sequence"].crossings if call.origin == "pinned"}
