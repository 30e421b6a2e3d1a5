"""The CUDA engine on a GPU: against the CPU, against itself in other batches, and its transfers to the host."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import device as fake_device
from fake_cuda.inputs import random_inputs

from unroll import bundle
from unroll.service import app
from unroll.service.core.errors import NonFiniteOutput
from unroll.service.engine.backend import EngineOptions, open_backend, open_cuda
from unroll.service.engine.cuda.cells import CellKernel
from unroll.service.engine.cuda.cuda_engine import CudaEngine
from unroll.service.engine.cuda.device import Device
from unroll.service.engine.cuda.parts import Layer
from unroll.service.engine.cuda.step_call import COMMIT, GATHER
from unroll.service.engine.cuda.step_graph import take_apart
from unroll.service.engine.engine import Engine, PlainRows
from unroll.service.engine.runner import Runner, resolve_devices
from unroll.service.engine.tensor_ref import TensorRef
from unroll.service.models.contents import RepositoryError
from unroll.service.settings import Settings
from unroll.service.state.slots import INITIAL

pytestmark = pytest.mark.gpu

NAMES = ["lstm", "gru", "last", "tokens", "two"]
ROWS = 80
BUCKETS = (1, 4, 16, 64)


@pytest.fixture(scope="module")
def cuda() -> str:
    (device, *_), why = resolve_devices("auto")
    if device == "cpu":
        pytest.skip(why)
    return device


@pytest.fixture(scope="module")
def device(cuda: str) -> Device:
    return open_cuda(cuda)


@pytest.fixture(params=NAMES)
def found(request: pytest.FixtureRequest, repository: Path) -> bundle.Bundle:
    return bundle.read(repository / request.param / "1")


@pytest.fixture(params=["fused", "onnxruntime"])
def cells(request: pytest.FixtureRequest) -> str:
    return request.param


def engine_of(found: bundle.Bundle, device: Device, cells: str, buckets: tuple[int, ...] = BUCKETS) -> CudaEngine:
    runner = Runner(found.model, found.manifest, device.name, stream=device.stream)
    parts = take_apart(found.model, found.manifest) if cells == "fused" else []
    return CudaEngine(device, runner, found.manifest, ROWS, buckets, parts)


@pytest.fixture
def engine(found: bundle.Bundle, cuda: str, cells: str) -> Iterator[CudaEngine]:
    engine = engine_of(found, open_cuda(cuda), cells)
    yield engine
    engine.close()


def tolerance(manifest: bundle.Manifest, name: str) -> float:
    return 2 * next(entry.tolerance for entry in manifest.parity if entry.output == name)


def assert_close(manifest: bundle.Manifest, one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> None:
    for spec, a, b in zip(manifest.outputs, one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance(manifest, spec.name))


@pytest.mark.parametrize("width", [1, 7, 256, 1000])
def test_kernels_equal_their_numpy_equivalents(device: Device, width: int):
    """Five rows; the fourth has already failed, and the last has no target."""
    rng = np.random.default_rng(width)
    rows, slots, features = 5, 9, 3
    arena = rng.standard_normal((slots, width)).astype(np.float32)
    after, y = rng.standard_normal((rows, width)).astype(np.float32), rng.standard_normal((64,)).astype(np.float32)
    after[1, -1] = np.nan
    y[2 * features] = np.inf
    given = {
        "arena": arena,
        "sources": np.array([3, 1, 1, 8, 0]),
        "state": np.zeros((rows, width), np.float32),
        "failed": np.array([9, 9, 9, 9, 9], np.int32),
        "first": np.array([1]),
        "call": np.zeros(256, np.uint8),
        "host": rng.integers(0, 255, 256, np.uint8),
        "targets": np.array([4, 5, 6, 7, -1]),
        "after": after,
        "host_failed": np.zeros(rows, np.int32),
        "y": y,
        "checked": np.array([[0, features]]),
        "answered": np.zeros(256, np.uint8),
    }
    there = {name: _on_device(device, array) for name, array in given.items()}
    ours = {name: array.copy() for name, array in given.items()}

    def both(run, names: list[str], *rest: int) -> None:
        run(device, [there[name].pointer for name in names], *rest)
        run(None, [ours[name].ctypes.data for name in names], *rest)

    def gathered(on, at: list[int]) -> None:
        arguments = at[0], width, *at[1:], 256
        on.run(GATHER, (rows, 1), *arguments) if on else fake_device.gather(rows, *arguments)

    def committed(on, at: list[int]) -> None:
        arguments = at[0], width, *at[1:7], 1, at[7], 256
        on.run(COMMIT, (rows, 1), *arguments) if on else fake_device.commit(rows, *arguments)

    both(gathered, ["arena", "sources", "state", "failed", "first", "call", "host"])
    _compare(device, there, ours)
    ours["failed"][3] = 1
    device.upload(there["failed"].pointer, ours["failed"])
    both(committed, ["arena", "targets", "after", "failed", "host_failed", "y", "checked", "answered"])
    _compare(device, there, ours)
    assert ours["failed"].tolist() == ours["host_failed"].tolist() == [0, 1, 1, 1, 0]
    assert np.array_equal(ours["arena"][4], after[0])
    assert np.array_equal(ours["arena"][5:8], arena[5:8])


def _compare(device: Device, there: dict[str, TensorRef], here: dict[str, np.ndarray]) -> None:
    for name, array in here.items():
        found = np.empty_like(array)
        device.download(found, there[name].pointer)
        assert found.tobytes() == array.tobytes(), name


def test_steps_chunks_and_sequences_equal_the_cpu(found: bundle.Bundle, engine: CudaEngine):
    assert engine.captured
    manifest = found.manifest
    on_cpu, _ = open_backend(found, "cpu", EngineOptions()).create_engine(ROWS, max_batch=64)
    rng = np.random.default_rng(1)
    for steps in (1, 1, 3, 1, 12, 1):
        count = int(rng.integers(1, 64))
        slots = rng.permutation(np.arange(2, ROWS))[:count].tolist()
        sources = [INITIAL if rng.random() < 0.3 or not engine.read(slot).any() else slot for slot in slots]
        lens = rng.integers(1, steps + 1, count).tolist() if manifest.ragged else [steps] * count
        inputs = tuple(
            np.stack(parts) for parts in zip(*(random_inputs(manifest, rng, max(lens)) for _ in lens), strict=True)
        )
        rows = PlainRows(inputs, lens, sources, slots)
        answers, failed = engine.run(rows)
        expected, _ = on_cpu.run(rows)
        assert not failed
        for i, length in enumerate(lens):
            one, other = (
                tuple(a[i, :length] if spec.time else a[i] for spec, a in zip(manifest.outputs, arrays, strict=True))
                for arrays in (answers, expected)
            )
            assert_close(manifest, one, other)
        for slot in slots:
            np.testing.assert_allclose(
                engine.read(slot), on_cpu.read(slot), rtol=0, atol=tolerance(manifest, "state_out")
            )
            engine.write(slot, on_cpu.read(slot))  # otherwise the differences would accumulate


def test_two_launches_may_be_outstanding(found: bundle.Bundle, engine: CudaEngine):
    rng = np.random.default_rng(2)
    batches = [
        PlainRows(tuple(a[None, :1] for a in random_inputs(found.manifest, rng, 1)), [1], [INITIAL], [slot])
        for slot in range(2, 12)
    ]
    expected = [engine.run(batch)[0] for batch in batches]
    results, waiting = [], engine.launch(batches[0])
    for batch in batches[1:]:
        following = engine.launch(batch)
        assert waiting is not None
        results.append(waiting()[0])
        waiting = following
    assert waiting is not None
    results.append(waiting()[0])
    for one, other in zip(results, expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_batch_company_and_row_index_change_no_bit_within_a_bucket(found: bundle.Bundle, device: Device, cells: str):
    engine = engine_of(found, device, cells, (64,))
    rng = np.random.default_rng(3)
    mine = random_inputs(found.manifest, rng, 8)

    def streamed(seed: int) -> list[np.ndarray]:
        """The same session in shared batches, at a different index at every step."""
        others, answers = np.random.default_rng(seed), []
        for t in range(8):
            count = int(others.integers(1, 64))
            place = int(others.integers(0, count))
            slots = list(range(3, 3 + count))
            slots[place] = 2
            rows = [random_inputs(found.manifest, others, 1) for _ in range(count)]
            rows[place] = tuple(a[t : t + 1] for a in mine)
            inputs = tuple(np.stack(parts) for parts in zip(*rows, strict=True))
            sources = [INITIAL] * count
            sources[place] = 2 if t else INITIAL
            answers.append(engine.run(PlainRows(inputs, [1] * count, sources, slots))[0][0][place])
        return [*answers, engine.read(2)]

    first = streamed(1)
    for seed in (2, 3):
        assert all(np.array_equal(a, b) for a, b in zip(first, streamed(seed), strict=True))


def test_no_state_crosses_to_the_host(found: bundle.Bundle, engine: CudaEngine):
    """A step copies nothing of a row's size between host and device, regardless of the number of rows."""
    from cuda.bindings import runtime

    from unroll.service.engine.cuda.driver import CapturedGraph

    row_bytes = 4 * found.manifest.state_size
    for size in BUCKETS:
        graph = engine.graph(size)
        assert isinstance(graph, CapturedGraph)
        for node in graph.nodes():
            kind = runtime.cudaGraphNodeGetType(node)[1]
            assert kind != runtime.cudaGraphNodeType.cudaGraphNodeTypeHost
            if kind == runtime.cudaGraphNodeType.cudaGraphNodeTypeMemcpy:
                parameters = runtime.cudaGraphMemcpyNodeGetParams(node)[1]
                crossing = parameters.kind != runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
                # onnxruntime passes the row lengths, all 1, to each LSTM and GRU.
                assert not crossing or parameters.extent.width <= 4 * size < row_bytes * size


def test_non_finite_row_fails_alone_and_is_not_stored(found: bundle.Bundle, engine: CudaEngine):
    rng = np.random.default_rng(4)
    engine.write(3, np.full(found.manifest.state_size, np.inf, np.float32))
    engine.write(4, np.zeros(found.manifest.state_size, np.float32))
    for steps in (1, 2):
        inputs = tuple(np.stack([a, a]) for a in random_inputs(found.manifest, rng, steps))
        outputs, failed = engine.run(PlainRows(inputs, [steps] * 2, [INITIAL, 3], [2, 4]))
        assert {row: type(error) for row, error in failed.items()} == {1: NonFiniteOutput}
        assert not engine.read(4).any()
        assert engine.read(2).any()
        assert all(np.isfinite(output[0]).all() for output in outputs)


def test_rows_are_saved_restored_and_forked(engine: Engine, found: bundle.Bundle):
    row = np.random.default_rng(5).standard_normal(found.manifest.state_size).astype(np.float32)
    engine.write(7, row)
    engine.copy(7, 8)
    engine.write(7, row + 1)
    assert np.array_equal(engine.read(8), row)
    assert np.array_equal(engine.read(7), row + 1)


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
def test_the_golden_vectors_hold_in_every_bucket(found: bundle.Bundle, cuda: str, precision, cells):
    backend = open_backend(found, cuda, EngineOptions(precision=precision, buckets=BUCKETS, cells=cells))
    whole = bundle.Verifier(backend.runner, found.manifest).replay(found.golden, backend.slack)
    _, proof = backend.create_engine(ROWS, max_batch=64)
    assert set(proof.parity) == set(whole)
    if precision == "float32":
        assert proof.stability < 1e-5


def test_split_sequence_equals_its_steps_bit_for_bit(found: bundle.Bundle, device: Device):
    engine = engine_of(found, device, "fused")
    inputs = tuple(a[None] for a in random_inputs(found.manifest, np.random.default_rng(7), 30))
    whole, _ = engine.run(PlainRows(inputs, [30], [INITIAL], [2]))
    steps = [
        engine.run(PlainRows(tuple(a[:, t : t + 1] for a in inputs), [1], [3 if t else INITIAL], [3]))[0]
        for t in range(30)
    ]
    for spec, one, *parts in zip(found.manifest.outputs, whole, *steps, strict=True):
        assert np.array_equal(one, np.concatenate(parts, axis=1) if spec.time else parts[-1])
    assert np.array_equal(engine.read(2), engine.read(3))


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize(("inputs", "hidden"), [(3, 8), (64, 256), (130, 77), (257, 130), (1, 1), (512, 1024)])
def test_every_tile_gives_the_same_bits_and_float32s_accuracy(device: Device, cell, inputs: int, hidden: int):
    """Compared with a float64 reference; a non-finite row does not change its neighbours' bits."""
    rng, gates = np.random.default_rng(hidden), {"LSTM": 4, "GRU": 3}[cell]
    k = hidden**-0.5
    w, r, b = (
        rng.uniform(-k, k, shape).astype(np.float32)
        for shape in ((gates * hidden, inputs), (gates * hidden, hidden), (2 * gates * hidden,))
    )
    lstm = cell == "LSTM"
    layer = Layer(cell, "x", "y", w, r, b, 0, hidden if lstm else 0, bounded=False)
    width = hidden * (2 if lstm else 1)
    kernel = CellKernel(device, layer, width, tf32=False)
    slots = rng.permutation(100)
    states = rng.uniform(-1, 1, (100, width)).astype(np.float32)
    x = rng.standard_normal((100, inputs)).astype(np.float32)
    arena = _on_device(device, states)
    seen: np.ndarray | None = None
    for size in (1, 3, 8, 20, 33, 64, 100):
        for poisoned in (False, True):
            given = x[:size].copy()
            if poisoned:
                given[size // 2] = np.nan
            y, state_out = (
                _on_device(device, np.full(shape, 7, np.float32)) for shape in ((size, hidden), (size, width))
            )
            places = _on_device(device, slots[:size])
            kernel.bind(size, _on_device(device, given), arena, places, state_out, y, overlaps_previous=False)()
            found, after = np.empty((size, hidden), np.float32), np.empty((size, width), np.float32)
            device.download(found, y.pointer)
            device.download(after, state_out.pointer)
            fine = np.arange(size) != (size // 2 if poisoned else -1)
            assert np.isnan(found[~fine]).all()
            assert np.array_equal(found, after[:, :hidden], equal_nan=True)
            if seen is None:
                seen = after
            common = min(len(seen), size)
            assert np.array_equal(after[:common][fine[:common]], seen[:common][fine[:common]])
            if not poisoned:
                seen = after if size > len(seen) else seen
                reference = fake_device.cell_step(
                    lstm, x[:size], states[slots[:size]], w, r, b, hidden, 0, hidden if lstm else 0
                )
                assert np.abs(after - reference).max() < 4e-7


def _on_device(device: Device, array: np.ndarray) -> TensorRef:
    memory = device.allocate(array.shape, array.dtype)
    device.upload(memory.pointer, np.ascontiguousarray(array))
    return memory


def test_the_bidirectional_model_takes_whole_sequences(repository: Path, device: Device):
    found = bundle.read(repository / "whole" / "1")
    runner = Runner(found.model, found.manifest, device.name, stream=device.stream)
    bundle.Verifier(runner, found.manifest).replay(found.golden)
    engine = CudaEngine(device, runner, found.manifest, ROWS, ())
    inputs = tuple(a[None] for a in random_inputs(found.manifest, np.random.default_rng(6), 9))
    rows = PlainRows(inputs, [9], [INITIAL], [2])
    on_cpu, _ = open_backend(found, "cpu", EngineOptions()).create_engine(ROWS, max_batch=1)
    assert_close(found.manifest, engine.run(rows)[0], on_cpu.run(rows)[0])


def test_capacity_fits_the_memory_or_is_refused(repository: Path, cuda: str):
    def build(**options: object) -> object:
        return app.build(Settings(repository=repository, device=cuda, max_batch=16, **options))[1]

    server = build(session_capacity="auto", memory_share=0.0001)
    assert all(10 < model.scheduler.sessions.limits.capacity < 10**7 for model in server.models)
    with pytest.raises(RepositoryError, match=r"rows do not fit.*lower --session-capacity"):
        build(session_capacity=2**38)


def test_memory_is_freed(found: bundle.Bundle, cuda: str):
    device = open_cuda(cuda)
    runner = Runner(found.model, found.manifest, device.name, stream=device.stream)
    before = device.free_bytes()
    engine = CudaEngine(device, runner, found.manifest, 10_000_000, BUCKETS)
    assert device.free_bytes() < before - 4 * 10_000_000 * found.manifest.state_size
    engine.close()
    assert device.free_bytes() > before - 2**28  # kept by onnxruntime for its session


def test_fake_device_has_the_interface_of_the_real_one(device: Device):
    real = {name for name in dir(device) if not name.startswith("_")}
    assert real <= {name for name in dir(fake_device.FakeDevice()) if not name.startswith("_")}
