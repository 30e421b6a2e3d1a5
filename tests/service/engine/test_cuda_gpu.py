"""The CUDA engine on a GPU: against the CPU, against itself in other company, and what crosses to the host."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import bundle
from service import app
from service.catalog.catalog import CatalogError
from service.core.errors import NonFiniteOutput
from service.engine.base import Engine, PlainRows
from service.engine.cuda.base import Device
from service.engine.cuda.engine import CudaEngine
from service.engine.place import EngineOptions, open_cuda, place
from service.engine.runner import Runner, resolve_devices
from service.settings import Settings
from service.state.slots import INITIAL
from tests.service.engine import fake_device
from tests.service.engine.rows import random_inputs

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


@pytest.fixture
def engine(found: bundle.Bundle, device: Device) -> Iterator[CudaEngine]:
    runner = Runner(found.model_path, found.manifest, device.name, stream=device.stream)
    yield CudaEngine(device, runner, found.manifest, ROWS, BUCKETS)
    device.synchronize()


def tolerance(manifest: bundle.Manifest, name: str) -> float:
    return 2 * next(entry.tolerance for entry in manifest.parity if entry.output == name)


def assert_close(manifest: bundle.Manifest, one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> None:
    for spec, a, b in zip(manifest.outputs, one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance(manifest, spec.name))


@pytest.mark.parametrize("width", [1, 7, 256, 1000])
def test_the_kernels_do_what_their_equivalents_do(device: Device, width: int):
    rng = np.random.default_rng(width)
    rows, slots, features = 5, 9, 3
    arena = rng.standard_normal((slots, width)).astype(np.float32)
    on_device = device.allocate(arena.shape, arena.dtype)
    state, outputs = device.allocate((rows, width), np.float32), device.allocate((256,), np.uint8)
    block = device.host_block(1024)
    sources = block[:40].view(np.int64)
    sources[:] = [3, 1, 1, 8, 0]
    given, failed, answered = block[256:512], block[512:532].view(np.int32), block[768:1024]
    given[:] = rng.integers(0, 255, 256)
    device.upload(on_device.pointer, arena)
    at = block.ctypes.data
    device.run("gather", rows, on_device.pointer, width, at, state.pointer, outputs.pointer, at + 256, 256)
    gathered, copied = np.empty((rows, width), np.float32), np.empty(256, np.uint8)
    device.download(gathered, state.pointer)
    device.download(copied, outputs.pointer)
    assert np.array_equal(gathered, arena[sources])
    assert np.array_equal(copied, given)

    after = rng.standard_normal((rows, width)).astype(np.float32)
    after[1, -1] = np.nan
    y = rng.standard_normal((rows, features)).astype(np.float32)
    y[3, 2] = np.inf
    table = device.allocate((1, 2), np.int64)
    device.upload(table.pointer, np.array([[0, features]]))
    device.upload(state.pointer, after)
    device.upload(outputs.pointer, y)
    sources[:] = [4, 5, 6, 7, 2]
    arguments = (width, at, state.pointer, at + 512, outputs.pointer, table.pointer, 1, at + 768, 256)
    device.run("commit", rows, on_device.pointer, *arguments)
    device.synchronize()
    assert failed.tolist() == [0, 1, 0, 1, 0]
    assert np.array_equal(answered[: y.nbytes].view(np.float32).reshape(y.shape), y)
    expected = arena.copy()
    for row in (0, 2, 4):
        expected[sources[row]] = after[row]
    found = np.empty_like(arena)
    device.download(found, on_device.pointer)
    assert np.array_equal(found, expected)


def test_steps_chunks_and_sequences_answer_as_the_cpu_does(found: bundle.Bundle, engine: CudaEngine):
    assert engine.captured
    manifest = found.manifest
    on_cpu = place(found, "cpu", EngineOptions()).engine(ROWS, max_batch=64)
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
            engine.write(slot, on_cpu.read(slot))  # or the differences would add up


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


def test_in_one_bucket_neither_company_nor_place_changes_a_bit(found: bundle.Bundle, device: Device):
    runner = Runner(found.model_path, found.manifest, device.name, stream=device.stream)
    engine = CudaEngine(device, runner, found.manifest, ROWS, (64,))
    rng = np.random.default_rng(3)
    mine = random_inputs(found.manifest, rng, 8)

    def streamed(seed: int) -> list[np.ndarray]:
        """The same session among others, in another place of the batch at every step."""
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
    """Within a step there is no copy between host and device of a row's size, whatever the rows."""
    from cuda.bindings import runtime

    from service.engine.cuda.driver import CapturedGraph

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
                # onnxruntime sends each LSTM and GRU the lengths of its rows, which are all 1.
                assert not crossing or parameters.extent.width <= 4 * size < row_bytes * size


def test_a_row_that_is_not_finite_fails_alone_and_is_not_kept(found: bundle.Bundle, engine: CudaEngine):
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
def test_the_golden_vectors_hold_in_every_bucket(found: bundle.Bundle, cuda: str, precision):
    here = place(found, cuda, EngineOptions(precision=precision, buckets=BUCKETS))
    whole = bundle.replay(found.golden, found.manifest, here.runner, here.slack)
    proof = here.prove(here.engine(ROWS, max_batch=64), ROWS)
    assert set(proof.parity) == set(whole)
    if precision == "float32":
        assert proof.stability < 1e-5


def test_the_bidirectional_model_takes_whole_sequences(repository: Path, device: Device):
    found = bundle.read(repository / "whole" / "1")
    runner = Runner(found.model_path, found.manifest, device.name, stream=device.stream)
    bundle.replay(found.golden, found.manifest, runner)
    engine = CudaEngine(device, runner, found.manifest, ROWS, ())
    inputs = tuple(a[None] for a in random_inputs(found.manifest, np.random.default_rng(6), 9))
    rows = PlainRows(inputs, [9], [INITIAL], [2])
    on_cpu = place(found, "cpu", EngineOptions()).engine(ROWS, max_batch=1)
    assert_close(found.manifest, engine.run(rows)[0], on_cpu.run(rows)[0])


def test_capacity_is_what_fits_or_is_refused(repository: Path, cuda: str):
    def build(**options: object) -> object:
        return app.build(Settings(repository=repository, device=cuda, max_batch=16, **options))[1]

    server = build(session_capacity="auto", memory_share=0.0001)
    assert all(10 < model.scheduler.sessions.limits.capacity < 10**7 for model in server.catalog)
    with pytest.raises(CatalogError, match=r"rows do not fit.*lower --session-capacity"):
        build(session_capacity=2**38)


def test_memory_is_given_back(found: bundle.Bundle, cuda: str):
    device = open_cuda(cuda)
    runner = Runner(found.model_path, found.manifest, device.name, stream=device.stream)
    before = device.free_bytes()
    engine = CudaEngine(device, runner, found.manifest, 10_000_000, BUCKETS)
    assert device.free_bytes() < before - 4 * 10_000_000 * found.manifest.state_size
    engine.close()
    assert device.free_bytes() > before - 2**28  # what onnxruntime keeps for its session


def test_the_fake_device_offers_what_the_real_one_does(device: Device):
    real = {name for name in dir(device) if not name.startswith("_")}
    assert real <= {name for name in dir(fake_device.FakeDevice()) if not name.startswith("_")}
