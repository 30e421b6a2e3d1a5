"""The bucket of a batch, the offsets of its tensors, and the device operations of a step."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from fake_cuda.device import FakeDevice
from hypothesis import given

from unroll import bundle
from unroll.service.engine.cuda.cuda_engine import CudaEngine
from unroll.service.engine.cuda.device import OutOfDeviceMemory
from unroll.service.engine.cuda.layout import BUCKETS, BlockLayout, bucket_of, buckets
from unroll.service.engine.engine import PlainRows
from unroll.service.engine.runner import Runner
from unroll.service.engine.tensor_ref import TensorRef
from unroll.service.state.slots import INITIAL, SCRATCH


@given(st.integers(1, 5000), st.data())
def test_every_batch_has_the_smallest_bucket_that_holds_it(max_batch: int, data: st.DataObject):
    sizes = buckets((), max_batch)
    rows = data.draw(st.integers(1, max_batch))
    size = bucket_of(sizes, rows)
    assert size >= rows
    assert all(other < rows for other in sizes if other < size)
    assert sizes[-1] == max_batch
    assert set(sizes[:-1]) <= set(BUCKETS)


def test_buckets_that_are_asked_for_are_taken():
    assert buckets((64, 1, 256, 1024), 256) == (1, 64, 256)
    assert buckets((256,), 256) == (256,)
    assert buckets((256,), 100) == (256,)
    with pytest.raises(ValueError, match="up to 256 rows do not fit the largest bucket, 64"):
        buckets((1, 64), 256)


@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(["f4", "i8", "?"])), max_size=5))
def test_tensors_are_aligned_and_do_not_overlap(tensors):
    layout = BlockLayout([(tuple(shape), np.dtype(dtype)) for shape, dtype in tensors])
    block = np.zeros(layout.nbytes, np.uint8)
    views = layout.views(block)
    for i, (view, memory) in enumerate(zip(views, layout.memories(TensorRef.of(block)), strict=True)):
        assert (memory.pointer - block.ctypes.data) % 256 == 0
        assert not view.size or view.ctypes.data == memory.pointer
        assert memory.shape == view.shape
        view.reshape(-1).view(np.uint8)[:] = i + 1
    assert [np.count_nonzero(block == i + 1) for i in range(len(views))] == [view.nbytes for view in views]
    assert layout.nbytes % 16 == 0


@pytest.fixture
def lstm(repository: Path) -> bundle.Bundle:
    return bundle.read(repository / "lstm" / "1")


def test_a_step_is_one_launch_and_moves_no_state(lstm: bundle.Bundle):
    device = FakeDevice()
    engine = CudaEngine(device, Runner(lstm.model, lstm.manifest), lstm.manifest, 16, (4, 8))
    device.calls.clear()
    x = np.ones((3, 1, 3), np.float32)
    engine.run(PlainRows((x,), [1] * 3, [INITIAL] * 3, [2, 3, 4]))
    assert device.calls == [("launch", 0), ("gather", 4), ("commit", 4), ("wait", 0)]


def test_smaller_batch_does_not_change_rows_of_the_previous_one(lstm: bundle.Bundle):
    engine = CudaEngine(FakeDevice(), Runner(lstm.model, lstm.manifest), lstm.manifest, 16, (8,))
    x = np.random.default_rng(0).standard_normal((5, 1, 3)).astype(np.float32)
    for _ in range(2):  # in both alternating calls
        engine.run(PlainRows((x,), [1] * 5, [INITIAL] * 5, [2, 3, 4, 5, 6]))
    before = [engine.read(slot) for slot in range(2, 7)]
    initial = engine.read(INITIAL)
    for _ in range(4):
        engine.run(PlainRows((x[:1],), [1], [INITIAL], [SCRATCH]))
    assert all(np.array_equal(engine.read(slot), row) for slot, row in zip(range(2, 7), before, strict=True))
    assert np.array_equal(engine.read(INITIAL), initial)


def test_engine_larger_than_device_memory_is_refused(lstm: bundle.Bundle):
    with pytest.raises(OutOfDeviceMemory, match="are free"):
        CudaEngine(FakeDevice(1000), Runner(lstm.model, lstm.manifest), lstm.manifest, 10_000, (1,))
