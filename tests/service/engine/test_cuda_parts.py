"""A split model on a device in host memory: the graph is split correctly, and the kernels get correct arguments.

The kernel's equivalent computes in float64, so answers agree with onnxruntime's within rounding only.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_cuda.device import FakeDevice
from fake_cuda.inputs import random_inputs
from served_models import models

from unroll import bundle
from unroll.service.core.errors import NonFiniteOutput
from unroll.service.engine.cuda.cells import TILES, tile_for
from unroll.service.engine.cuda.cuda_engine import CudaEngine
from unroll.service.engine.cuda.parts import Layer, NotSeparable, Segment
from unroll.service.engine.cuda.step_graph import take_apart
from unroll.service.engine.engine import PlainRows
from unroll.service.engine.host_engine import HostEngine
from unroll.service.engine.runner import Runner
from unroll.service.state.slots import INITIAL

NAMES = ["lstm", "gru", "last", "tokens", "two"]
ROWS = 40


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that are split at other nodes."""
    return models.link(tmp_path_factory.mktemp("more"), "residual", "stateused", "bare")


def read(repository: Path, more: Path, name: str) -> bundle.Bundle:
    return bundle.read((more if (more / name).exists() else repository) / name / "1")


def engine_of(found: bundle.Bundle, *, tf32: bool = False) -> CudaEngine:
    parts = take_apart(found.model, found.manifest)
    runner = Runner(found.model, found.manifest)
    return CudaEngine(FakeDevice(), runner, found.manifest, ROWS, (1, 4, 9), parts, tf32=tf32)


def kinds(parts: list[Layer | Segment]) -> list[str | list[str]]:
    return [
        part.cell
        if isinstance(part, Layer)
        else [node.op_type for node in onnx.ModelProto.FromString(part.model).graph.node]
        for part in parts
    ]


def test_the_graph_is_cut_around_its_layers(repository: Path, more: Path):
    def parts(name: str) -> list[str | list[str]]:
        found = read(repository, more, name)
        return kinds(take_apart(found.model, found.manifest))

    assert parts("lstm") == ["LSTM", "LSTM", ["MatMul", "Add"]]
    assert parts("two") == [["Concat", "Transpose"], "GRU", ["MatMul", "Add", "MatMul", "Add"]]
    assert parts("tokens") == [["Gather", "Transpose"], "GRU", ["MatMul", "Add"]]
    first, between, second, head = parts("residual")
    assert (first, second) == ("LSTM", "GRU")
    assert "LayerNormalization" in between
    assert {"Relu", "Concat", "Add"} <= {*head}


@pytest.mark.parametrize(("name", "why"), [("whole", "not a plain GRU"), ("stateused", "another node uses")])
def test_unsplittable_graph_gives_the_reason(repository: Path, more: Path, name: str, why: str):
    found = read(repository, more, name)
    with pytest.raises(NotSeparable, match=why):
        take_apart(found.model, found.manifest)


@pytest.mark.parametrize("name", [*NAMES, "residual", "bare"])
def test_steps_and_sequences_equal_the_host_engine(repository: Path, more: Path, name: str):
    found = read(repository, more, name)
    manifest, rng = found.manifest, np.random.default_rng(0)
    engine, host = engine_of(found), HostEngine(Runner(found.model, found.manifest), manifest, ROWS)
    begun: set[int] = set()
    for lens in ([1], [1, 1, 1], [5, 2, 1], [1] * 9, [3] * 4, [1, 7], [2] * 9):
        lens = lens if manifest.ragged else [max(lens)] * len(lens)
        slots = rng.permutation(np.arange(2, ROWS))[: len(lens)].tolist()
        sources = [slot if slot in begun else INITIAL for slot in slots]
        begun.update(slots)
        inputs = tuple(
            np.stack(parts) for parts in zip(*(random_inputs(manifest, rng, max(lens)) for _ in lens), strict=True)
        )
        rows = PlainRows(inputs, lens, sources, slots)
        (answers, failed), (expected, _) = engine.run(rows), host.run(rows)
        assert not failed
        for i, steps in enumerate(lens):
            for spec, one, other in zip(manifest.outputs, answers, expected, strict=True):
                one, other = (a[i, :steps] if spec.time else a[i] for a in (one, other))
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        for slot in slots:
            np.testing.assert_allclose(engine.read(slot), host.read(slot), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "residual"])
def test_sequence_equals_its_steps_bit_for_bit(repository: Path, more: Path, name: str):
    found = read(repository, more, name)
    engine = engine_of(found)
    inputs = tuple(a[None] for a in random_inputs(found.manifest, np.random.default_rng(2), 6))
    whole, _ = engine.run(PlainRows(inputs, [6], [INITIAL], [2]))
    steps = [
        engine.run(PlainRows(tuple(a[:, t : t + 1] for a in inputs), [1], [3 if t else INITIAL], [3]))[0]
        for t in range(6)
    ]
    for spec, one, *parts in zip(found.manifest.outputs, whole, *steps, strict=True):
        assert np.array_equal(one, np.concatenate(parts, axis=1) if spec.time else parts[-1])
    assert np.array_equal(engine.read(2), engine.read(3))


def test_a_chunk_that_fails_at_one_of_its_steps_changes_nothing(repository: Path, more: Path):
    found = read(repository, more, "residual")
    engine = engine_of(found)
    rng = np.random.default_rng(3)
    (x,) = random_inputs(found.manifest, rng, 5)
    engine.run(PlainRows((np.stack([x, x]),), [5, 5], [INITIAL] * 2, [2, 3]))
    before = engine.read(3)
    bad = x.copy()
    bad[2] = np.inf
    outputs, failed = engine.run(PlainRows((np.stack([x, bad, x]),), [5, 5, 2], [2, 3, INITIAL], [2, 3, 4]))
    assert {row: type(error) for row, error in failed.items()} == {1: NonFiniteOutput}
    assert np.array_equal(engine.read(3), before)
    (alone,), _ = engine.run(PlainRows((x[None, :2],), [2], [INITIAL], [5]))
    assert np.allclose(outputs[0][2, :2], alone[0], atol=1e-6)
    assert np.allclose(engine.read(4), engine.read(5), atol=1e-6)


def test_a_step_of_a_model_in_parts_is_one_launch(repository: Path, more: Path):
    found = read(repository, more, "lstm")
    device = FakeDevice()
    parts = take_apart(found.model, found.manifest)
    engine = CudaEngine(device, Runner(found.model, found.manifest), found.manifest, ROWS, (4,), parts)
    device.calls.clear()
    engine.run(PlainRows((np.ones((3, 1, 3), np.float32),), [1] * 3, [INITIAL] * 3, [2, 3, 4]))
    assert [name for name, _ in device.calls] == ["launch", "gather", "step", "step", "commit", "wait"]


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_a_tile_is_as_wide_as_the_batch_fills(cell):
    assert tile_for(cell, 256, 1, 132) is TILES[-1]
    assert tile_for(cell, 1024, 1024, 132) is TILES[0]
    widths = [tile_for(cell, 256, batch, 132).rows for batch in (1, 16, 64, 256, 1024)]
    assert widths == sorted(widths)
