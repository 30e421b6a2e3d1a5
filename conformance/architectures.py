"""Measures export and streaming of the models in `examples/architectures` and of a GRU stack: errors, time, size."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conformance import draws
from conformance.oracle import Arrays, Graph, examine
from unroll import bundle
from unroll.examples.architectures import denoiser, forecaster, keywords, voice
from unroll.export import export


@dataclass(frozen=True)
class Architecture:
    name: str
    like: str
    build: Callable[[], nn.Module]
    example: Callable[[], dict[str, Tensor]]
    static: tuple[str, ...] = ()


class Stack(nn.Module):
    """Three GRU layers of 512 and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(64, 512, 3, batch_first=True)
        self.head = nn.Linear(512, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def _stack() -> nn.Module:
    torch.manual_seed(0)
    return Stack().eval()


ARCHITECTURES = [
    Architecture("voice", "voice activity, after Silero VAD", voice.build, voice.example),
    Architecture("denoiser", "speech enhancement, after DTLN", denoiser.build, denoiser.example),
    Architecture("keywords", "keyword spotting, causal convolutions and GRUs", keywords.build, keywords.example),
    Architecture(
        "forecaster", "probabilistic forecasts, after DeepAR", forecaster.build, forecaster.example, ("series",)
    ),
    Architecture("stack", "a stack of three GRUs of 512", _stack, lambda: {"x": torch.randn(2, 16, 64)}),
]


@dataclass(frozen=True)
class Measured:
    """The measurements of one model.

    Attributes:
        error: the error found by the oracle.
        stages: CPU seconds by stage of export.
        step: CPU seconds per step of one session.
    """

    architecture: Architecture
    parameters: int
    streams: bool
    why: str
    error: float
    bits: bool | None
    state_bytes: int
    model_bytes: int
    stages: dict[str, float]
    step: float

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())


def measure(architecture: Architecture) -> Measured:
    """Measure one model. Raises Wrong or ExportError, because these models must work."""
    torch.set_num_threads(1)
    module, example = architecture.build(), architecture.example()
    single, double = architecture.build(), architecture.build().double()
    clock = _Stages()
    with tempfile.TemporaryDirectory() as folder:
        report = export(
            module, example, name=architecture.name, repository=folder, static=architecture.static, progress=clock
        )
        stages = clock.stop()
        found = bundle.read(report.path)
        manifest, graph = found.manifest, Graph(found)
        arrays = {name: tensor.numpy() for name, tensor in example.items()}
        static = {name: arrays.pop(name) for name in architecture.static}
        draw = draws.like(arrays, static, manifest)

        def answer(inputs: Arrays, wide: bool) -> Arrays:
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            if wide:
                tensors = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
            with torch.no_grad():
                returned: Any = (double if wide else single)(**tensors)
            returned = returned if isinstance(returned, dict) else {"y": returned}
            return {name: tensor.numpy() for name, tensor in returned.items()}

        finding = examine(report.path, answer, draw)
        one = draw(1, 1, np.random.default_rng(1))
        return Measured(
            architecture,
            sum(parameter.numel() for parameter in module.parameters()),
            manifest.streamable,
            manifest.not_streamable_because or "",
            finding.error,
            finding.bits,
            4 * manifest.state_size,
            (report.path / "model.onnx").stat().st_size,
            stages,
            fastest(lambda: graph.run(one, graph.start(one))),
        )


class _Stages:
    """CPU seconds of each stage, from the lines of progress."""

    def __init__(self) -> None:
        self._times: list[tuple[str, float]] = []

    def __call__(self, stage: str) -> None:
        self._times.append((stage, process_time()))

    def stop(self) -> dict[str, float]:
        ends = [time for _, time in self._times[1:]] + [process_time()]
        return {stage: end - start for (stage, start), end in zip(self._times, ends, strict=True)}


def fastest(call: Callable[[], object], turns: int = 20, calls: int = 10) -> float:
    times = []
    for _ in range(turns):
        start = process_time()
        for _ in range(calls):
            call()
        times.append((process_time() - start) / calls)
    return float(np.min(times))
