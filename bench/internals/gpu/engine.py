"""The CUDA engine as the server builds it from a bundle."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from bench.internals.gpu.shapes import FEATURES
from unroll import bundle
from unroll.service.core.choices import Cells, Precision
from unroll.service.engine.backend import CudaBackend, EngineOptions, open_cuda
from unroll.service.engine.cuda.driver import CapturedGraph
from unroll.service.engine.engine import MAX_LAUNCHED, BatchResult, PlainRows
from unroll.service.state.slots import INITIAL, SCRATCH

DEVICE = "cuda:0"


class MeasuredEngine:
    """rows: size of the arena. proof: differences on the golden vectors."""

    def __init__(self, path: Path, options: EngineOptions, rows: int) -> None:
        found = bundle.read(path)
        self.manifest = found.manifest
        backend = CudaBackend(found, open_cuda(DEVICE), options)
        self.engine, self.proof = backend.create_engine(rows, options.buckets[-1])
        assert self.engine.captured
        self.stream = backend.device.stream

    def graph(self, rows: int, *, transfers: bool = True) -> CapturedGraph:
        graph = self.engine.graph(rows, transfers=transfers)
        assert isinstance(graph, CapturedGraph)
        return graph

    def step(self, slots: np.ndarray, x: np.ndarray, *, first: bool) -> np.ndarray:
        """Output of one step of each slot; the first step starts from the initial state."""
        rows = steps_of(slots, x)
        outputs, failed = self.engine.run(replace(rows, sources=[INITIAL] * len(slots)) if first else rows)
        assert not failed
        return outputs[0]

    def seconds_per_step(self, batches: Sequence[PlainRows], count: int) -> float:
        """From host memory to host memory, cycling through the batches; launches ahead as the server does."""
        began = perf_counter()
        waiting: list[Callable[[], BatchResult]] = []
        for i in range(count):
            launched = self.engine.launch(batches[i % len(batches)])
            assert launched is not None
            waiting.append(launched)
            if len(waiting) == MAX_LAUNCHED:
                waiting.pop(0)()
        for result in waiting:
            result()
        return (perf_counter() - began) / count

    def sequences(self, x: np.ndarray) -> Callable[[], np.ndarray]:
        """x: (batch, time, features)."""
        count, steps, _ = x.shape
        rows = PlainRows((x,), [steps] * count, [INITIAL] * count, [SCRATCH] * count)
        return lambda: self.engine.run(rows)[0][0]


@contextmanager
def open_engine(
    path: Path, rows: int, buckets: Sequence[int], precision: Precision = "float32", cells: Cells = "fused"
) -> Iterator[MeasuredEngine]:
    """The engine of a bundle; its memory is released with the block."""
    found = MeasuredEngine(path, EngineOptions(precision=precision, cells=cells, buckets=tuple(sorted(buckets))), rows)
    yield found
    found.engine.close()


def steps_of(slots: np.ndarray, x: np.ndarray) -> PlainRows:
    """One step of each slot. x: (rows, 1, features)."""
    return PlainRows((x,), [1] * len(slots), slots, slots)


def inputs(rows: int, steps: int = 1) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, steps, FEATURES), np.float32)


def some_slots(rows: int, count: int) -> np.ndarray:
    """Distinct rows of an arena, in random order."""
    return np.random.default_rng(0).choice(count - 2, rows, replace=False) + 2
