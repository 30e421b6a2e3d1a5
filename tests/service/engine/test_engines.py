"""The real model in every engine: company, chunking and device change no bit, and a failed row affects no other.

The CUDA engine runs on a fake device in host memory; `test_cuda_gpu.py` runs it on a GPU.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NoReturn

import hypothesis.strategies as st
import numpy as np
import pytest
from fake_cuda.device import FakeDevice
from fake_cuda.inputs import random_inputs
from hypothesis import given, settings

from unroll import bundle
from unroll.service.core.errors import EngineFailed, NonFiniteOutput
from unroll.service.engine import runner as runner_module
from unroll.service.engine.cuda.cuda_engine import CudaEngine
from unroll.service.engine.engine import Engine, PlainRows
from unroll.service.engine.host_engine import HostEngine
from unroll.service.engine.runner import DeviceUnavailable, Runner, resolve_devices
from unroll.service.scheduler.chunk import Chunk
from unroll.service.scheduler.limits import ModelTraits, SchedulerLimits, SessionLimits
from unroll.service.scheduler.reply import Reply
from unroll.service.scheduler.scheduler import Scheduler
from unroll.service.state.slots import INITIAL


class NoCapture(FakeDevice):
    """A device that refuses graph capture, as for a model that partly runs on the CPU."""

    def capture(self, queue: Callable[[], None]) -> NoReturn:
        raise RuntimeError("operation not permitted when stream is capturing")


ENGINES = {
    "host": HostEngine,
    "cuda": lambda runner, manifest, rows: CudaEngine(FakeDevice(), runner, manifest, rows, (1, 2, 4, 9)),
    "cuda, one bucket": lambda runner, manifest, rows: CudaEngine(FakeDevice(), runner, manifest, rows, (9,)),
    "cuda, no buckets": lambda runner, manifest, rows: CudaEngine(FakeDevice(), runner, manifest, rows, ()),
    "cuda, no capture": lambda runner, manifest, rows: CudaEngine(NoCapture(), runner, manifest, rows, (1, 9)),
}


@pytest.fixture(params=ENGINES)
def make_engine(request: pytest.FixtureRequest):
    """Build an engine from a runner, its manifest and the number of arena rows."""
    return ENGINES[request.param]


@pytest.fixture(scope="module")
def load(repository: Path):
    """Return a runner and its manifest by model name."""

    @cache
    def load(name: str):
        found = bundle.read(repository / name / "1")
        return Runner(found.model, found.manifest), found.manifest

    return load


def alone(runner: Runner, manifest: bundle.Manifest, inputs: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """Run the whole sequence in one call without other rows; return each output, (time, *shape) or (*shape)."""
    feeds = {spec.name: array[np.newaxis] for spec, array in zip(manifest.inputs, inputs, strict=True)}
    outputs, _ = runner(feeds, manifest.initial_row()[np.newaxis], np.array([len(inputs[0])], np.int32))
    return [outputs[spec.name][0] for spec in manifest.outputs]


def run_all(scheduler: Scheduler, engine: Engine) -> None:
    while not scheduler.idle:
        _, batch = scheduler.next_turn(0)
        if batch.rows:
            scheduler.complete(batch, *engine.run(batch), 0)


#: Every model in both engines, and each bucket list of the second engine with one model.
COMPANY = [
    pytest.param(name, kind, marks=[] if kind in {"host", "cuda"} or name == "lstm" else [pytest.mark.long])
    for name in ("lstm", "gru", "last", "tokens", "two")
    for kind in ENGINES
]


@pytest.mark.parametrize(("name", "kind"), COMPANY)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32), piece=st.sampled_from([1, 2, 5, 16]), rows=st.integers(1, 9))
def test_any_chunks_in_any_batch_equal_the_whole_sequence(load, kind: str, name: str, seed: int, piece: int, rows: int):
    runner, manifest = load(name)
    rng = np.random.default_rng(seed)
    traits = ModelTraits(manifest.inputs, manifest.outputs, manifest.streamable, manifest.ragged)
    scheduler = Scheduler(traits, SessionLimits(20), SchedulerLimits(rows, 64, piece, 10_000))
    engine = ENGINES[kind](runner, manifest, scheduler.rows)
    wholes = {f"{i}": random_inputs(manifest, rng, int(rng.integers(1, 30))) for i in range(12)}
    sequences = {key: scheduler.submit(Chunk(whole), 0, 1e9) for key, whole in wholes.items()}
    streamed: dict[str, list[Chunk]] = {key: [] for key in wholes}
    sessions = {key: scheduler.open(key, 0) for key in wholes}
    at = dict.fromkeys(wholes, 0)
    while at:
        key = str(rng.choice(list(at)))
        length = int(rng.integers(1, 8))
        chunk = Chunk(tuple(a[at[key] : at[key] + length] for a in wholes[key]), sessions[key])
        scheduler.submit(chunk, 0, 1e9)
        streamed[key].append(chunk)
        at[key] += chunk.length
        if at[key] >= len(wholes[key][0]):
            del at[key]
        if rng.random() < 0.2:
            run_all(scheduler, engine)
    run_all(scheduler, engine)
    for key, whole in wholes.items():
        expected = alone(runner, manifest, whole)
        replies = [chunk.outcome for chunk in streamed[key]]
        whole_reply = sequences[key].outcome
        assert isinstance(whole_reply, Reply)
        for i, spec in enumerate(manifest.outputs):
            parts = [reply.outputs[i] for reply in replies if isinstance(reply, Reply)]
            assert len(parts) == len(replies)
            assert np.array_equal(np.concatenate(parts) if spec.time else parts[-1], expected[i])
            assert np.array_equal(whole_reply.outputs[i], expected[i])


def test_row_with_a_non_finite_state_fails_alone_and_is_not_stored(load, make_engine):
    runner, manifest = load("lstm")
    engine = make_engine(runner, manifest, 6)
    x = np.ones((2, 1, 3), np.float32)
    engine.write(3, np.full(manifest.state_size, np.inf, np.float32))
    engine.write(4, np.zeros(manifest.state_size, np.float32))
    outputs, failed = engine.run(PlainRows((x,), [1, 1], [INITIAL, 3], [2, 4]))
    assert {row: type(error) for row, error in failed.items()} == {1: NonFiniteOutput}
    assert not engine.read(4).any()
    assert np.array_equal(outputs[0][0], alone(runner, manifest, (x[0],))[0])


def test_a_row_the_model_cannot_run_fails_alone(load, make_engine):
    runner, manifest = load("tokens")
    engine = make_engine(runner, manifest, 6)
    tokens = np.array([[3, 1], [10**6, 0]])
    outputs, failed = engine.run(PlainRows((tokens,), [2, 1], [INITIAL, INITIAL], [2, 3]))
    assert {row: type(error) for row, error in failed.items()} == {1: EngineFailed}
    assert np.array_equal(outputs[0][0], alone(runner, manifest, (tokens[0],))[0])
    assert engine.read(2).any()
    assert not engine.read(3).any()


def test_several_rows_are_read_at_once(load, make_engine):
    runner, manifest = load("lstm")
    engine = make_engine(runner, manifest, 6)
    rows = np.random.default_rng(3).standard_normal((3, manifest.state_size), np.float32)
    for slot, row in zip((5, 2, 4), rows, strict=True):
        engine.write(slot, row)
    assert np.array_equal(engine.read_rows([5, 2, 4]), rows)


@pytest.mark.parametrize("lens", [[], [0], [2, 0]])
def test_empty_rows_never_reach_onnxruntime(load, lens: list[int]):
    runner, manifest = load("lstm")
    with pytest.raises(ValueError, match="at least one time step"):
        runner(
            {"x": np.zeros((len(lens), max(lens, default=0), 3), np.float32)},
            np.zeros((len(lens), manifest.state_size), np.float32),
            np.array(lens, np.int32),
        )


def test_absent_gpu_is_an_error_and_auto_reports_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner_module, "_missing_for_cuda", lambda index: "there is none")
    with pytest.raises(DeviceUnavailable, match="cuda:0 was requested, but there is none"):
        resolve_devices("cuda:0,cuda:1")
    assert resolve_devices("auto") == (("cpu",), "no GPU: there is none")
    for words in ("gpu", "cuda", "cuda:0,cpu", "cuda:0,cuda:0"):
        with pytest.raises(ValueError, match="use cpu, auto, or GPUs"):
            resolve_devices(words)
