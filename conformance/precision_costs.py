"""Measures the errors of float16 and int8, and their savings in size and time on this CPU, for some models."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from conformance.architectures import fastest
from conformance.matrix import PLUMBING
from conformance.oracle import Graph
from unroll import bundle
from unroll.bundle import Precision
from unroll.bundle.graph import operators
from unroll.examples.architectures import denoiser, voice
from unroll.export import ExportError, export
from unroll.export.signature.samples import Samples

Made = tuple[nn.Module, dict[str, Tensor]]

_INTEGER_MARKS = ("Quantize", "Integer")


@dataclass(frozen=True)
class Cost:
    """The cost of a precision: absolute errors against float64, and CPU seconds of a call with 1 and 32 rows."""

    model: str
    precision: str
    refused: str = ""
    error: float = 0.0
    bound: float = 0.0
    state: float = 0.0
    model_bytes: int = 0
    one: float = 0.0
    many: float = 0.0
    integers: str = ""
    floats: str = ""


class Layers(nn.Module):
    """Two recurrent layers and a head."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU], hidden: int) -> None:
        super().__init__()
        self.rnn = kind(16, hidden, 2, batch_first=True)
        self.head = nn.Linear(hidden, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def _layers(kind: type[nn.LSTM | nn.GRU], hidden: int) -> Callable[[], Made]:
    return lambda: (Layers(kind, hidden).eval(), {"x": torch.randn(2, 16, 16)})


_MODELS: dict[str, Callable[[], Made]] = {
    "LSTM 2×64": _layers(nn.LSTM, 64),
    "LSTM 2×256": _layers(nn.LSTM, 256),
    "GRU 2×64": _layers(nn.GRU, 64),
    "GRU 2×256": _layers(nn.GRU, 256),
    "voice": lambda: (voice.build(), voice.example()),
    "denoiser": lambda: (denoiser.build(), denoiser.example()),
}


def measure() -> Iterator[Cost]:
    torch.set_num_threads(1)
    for name, make in _MODELS.items():
        for precision in get_args(Precision):
            torch.manual_seed(0)
            yield _cost(name, precision, *make())


def _cost(name: str, precision: Precision, module: nn.Module, example: dict[str, Tensor]) -> Cost:
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = export(module, example, name="m", repository=folder, precision=precision)
        except ExportError as error:
            return Cost(name, precision, refused=str(error))
        found = bundle.read(report.path)
        graph = Graph(found)
        outputs = [entry for entry in found.manifest.parity if entry.output != "state_out"]
        [state] = [entry for entry in found.manifest.parity if entry.output == "state_out"]
        counted = operators(found.model)
        counted = {op: count for op, count in counted.items() if op not in PLUMBING | {"DynamicQuantizeLinear"}}
        integer = {op: count for op, count in counted.items() if any(mark in op for mark in _INTEGER_MARKS)}
        return Cost(
            name,
            precision,
            error=max(entry.onnxruntime for entry in outputs),
            bound=max(entry.tolerance for entry in outputs),
            state=state.onnxruntime,
            model_bytes=len(found.model),
            one=_seconds(graph, example, 1),
            many=_seconds(graph, example, 32),
            integers=_list(integer),
            floats=_list({op: count for op, count in counted.items() if op not in integer}),
        )


def _seconds(graph: Graph, example: dict[str, Tensor], rows: int) -> float:
    step = Samples({name: tensor.numpy() for name, tensor in example.items()}).draw(rows, 1, seed=1)
    start = graph.start(step)
    return fastest(lambda: graph.run(step, start))


def _list(counted: dict[str, int]) -> str:
    return ", ".join(f"{count} {op.rpartition('.')[2]}" for op, count in counted.items())
