"""Single steps: the engine's graphs, compared with the lower bound and with PyTorch's graph, measured alternately."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from bench.internals.gpu import pytorch
from bench.internals.gpu.engine import inputs, open_engine, some_slots, steps_of
from bench.internals.gpu.shapes import Shape, bundle_of, model
from unroll.service.core.choices import Precision

_ARENA = 20_000
_MANY, _FEW = 1_000_000, 1_000
#: PyTorch and the engine differ by rounding, in TF32 to 11 bits, over a few steps.
_TOLERANCE = {"float32": 1e-5, "tf32": 5e-3, "float16": 5e-3}


@dataclass(frozen=True, slots=True)
class Limits:
    """The device's limits per second: bytes copied, float32 operations without and with TF32."""

    copy: float
    float32: float
    tf32: float

    @classmethod
    def measured(cls) -> "Limits":
        return cls(pytorch.copy_rate(), pytorch.product_rate(tf32=False), pytorch.product_rate(tf32=True))


@dataclass(frozen=True, slots=True)
class Steps:
    """Microseconds of a step with `rows` rows, as medians of the turns.

    Attributes:
        device: launched back to back, with all data on the device.
        graph: the same, with transfers from and to the host.
        call: from array to array, as the server calls it.
        onnxruntime: `device`, with onnxruntime running the layers.
        torch: PyTorch's graph.
        floor: see `Shape.floor`.
        nodes: the number of nodes in the graph.
    """

    title: str
    rows: int
    precision: str
    device: float
    graph: float
    call: float
    onnxruntime: float
    torch: float
    floor: float
    nodes: int

    @property
    def steps_per_second(self) -> float:
        return self.rows / self.device * 1e6


def measure(
    shape: Shape, sizes: Sequence[int], precision: Precision, limits: Limits, repository: Path, turns: int, count: int
) -> list[Steps]:
    """Raise AssertionError if PyTorch's outputs differ."""
    tf32 = precision == "tf32"
    pytorch.set_tf32(tf32)
    reference, path = model(shape).cuda(), bundle_of(shape, repository)
    found = []
    with (
        open_engine(path, _ARENA, sizes, precision) as fused,
        open_engine(path, _ARENA, sizes, precision, "onnxruntime") as plain,
    ):
        for size in sizes:
            slots, x = some_slots(size, _ARENA), inputs(size)
            rows, torch_steps = steps_of(slots, x), pytorch.TorchSteps(reference, slots, x, _ARENA)
            for step in range(3):
                answers = [engine.step(slots, x, first=step == 0) for engine in (fused, plain)]
                torch_steps.launch()
                for answer in answers:
                    difference = np.abs(answer - torch_steps.answer()).max()
                    assert difference < _TOLERANCE[precision], f"{shape.title}, {size} rows: {difference} off PyTorch"
            launches: list[tuple[Callable[[], object], int | None]] = [
                (fused.graph(size, transfers=False).launch, fused.stream),
                (fused.graph(size).launch, fused.stream),
                (plain.graph(size, transfers=False).launch, plain.stream),
                (torch_steps.launch, None),
            ]
            each = [
                [
                    *(pytorch.seconds_per_launch(launch, count, stream) for launch, stream in launches),
                    fused.seconds_per_step([rows], count),
                ]
                for _ in range(turns)
            ]
            device, graph, layers, torch, call = (median(seconds) * 1e6 for seconds in zip(*each, strict=True))
            floor = shape.floor(size, limits.copy, limits.tf32 if tf32 else limits.float32) * 1e6
            nodes = len(fused.graph(size).nodes())
            found.append(Steps(shape.title, size, precision, device, graph, call, layers, torch, floor, nodes))
    return found


def resident(shape: Shape, size: int, repository: Path, turns: int, count: int) -> dict[int, float]:
    """Microseconds of a call for rows scattered over the arena, by the arena's number of sessions."""
    found = {}
    for sessions in (_FEW, _MANY):
        with open_engine(bundle_of(shape, repository), sessions + 2 + size, [size]) as engine:
            batches = [
                steps_of(np.random.default_rng(i).choice(sessions, size, replace=False) + 2, inputs(size))
                for i in range(32)
            ]
            engine.seconds_per_step(batches, count)
            found[sessions] = median(engine.seconds_per_step(batches, count) for _ in range(turns)) * 1e6
    return found
