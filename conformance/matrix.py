"""Measures one row of the matrix: a kind of module through export and the oracle, and through `torch.onnx.export`."""

import itertools
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from conformance import children, plain
from conformance.kinds import kinds
from conformance.oracle import Arrays, Graph, Wrong, examine
from tests.export.model_shapes import Shape
from unroll import bundle
from unroll.bundle.operators import operators
from unroll.export import ExportError, export
from unroll.export.lifting.float64 import double_precision
from unroll.export.signature.outputs import leaves
from unroll.export.signature.samples import Samples

#: What moves values about without computing any, or is too common to tell anything.
PLUMBING = {"Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity", "Range"} | {
    "Reshape",
    "Shape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}


@dataclass(frozen=True)
class Ours:
    """outcome: as of a random model; bits: whether chunks and company change no bit, None if it cannot be asked."""

    outcome: str
    says: str = ""
    error: float | None = None
    bits: bool | None = None
    nodes: str = ""


def ours(name: str) -> Ours:
    shape = _shape(name)
    module, example = _made(shape)
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = export(module, example, name="m", repository=folder, **shape.options)
        except ExportError as error:
            return Ours("refused", f"`{error.code}`: {error}")
        except Exception as error:
            return Ours("crashed", f"{type(error).__name__}: {error}")
        manifest = report.manifest
        counted = operators((report.path / "model.onnx").read_bytes())
        nodes = ", ".join(f"{count} {op}" for op, count in counted.items() if op not in PLUMBING)
        try:
            asked = _Asked(shape, bundle.read(report.path))
            found = examine(report.path, asked.answer, asked.draw)
        except Wrong as error:
            return Ours("wrong", str(error), nodes=nodes)
        if manifest.streamable:
            return Ours("streams", "", found.error, found.bits, nodes)
        return Ours("whole only", str(manifest.not_streamable_because), found.error, found.bits, nodes)


def theirs(job: tuple[str, bool]) -> plain.Verdict:
    name, dynamo = job
    shape = _shape(name)
    _, example = _made(shape)
    return plain.judge(lambda: _made(shape)[0], example, shape.options.get("batch_first", True), dynamo)


@dataclass(frozen=True)
class Row:
    name: str
    ours: Ours
    dynamo: plain.Verdict
    script: plain.Verdict


def measure(names: list[str], workers: int = 2) -> list[Row]:
    """Each export in a process of its own."""
    jobs: list[Any] = [(name, how) for name in names for how in ("ours", True, False)]
    found = {}
    for job, answer in children.run(_one, jobs, children=workers, seconds=300):
        found[job] = answer
        print(f"\r{len(found)} of {len(jobs)}", end="", file=sys.stderr, flush=True)
    return [
        Row(name, _ours(found[name, "ours"]), *(_theirs(found[name, how]) for how in (True, False))) for name in names
    ]


def _one(job: tuple[str, Any]) -> Any:
    return ours(job[0]) if job[1] == "ours" else theirs(job)


def _ours(answer: Any) -> Ours:
    return Ours("crashed", answer.reason) if isinstance(answer, children.Died) else answer


def _theirs(answer: Any) -> plain.Verdict:
    return plain.Verdict("fails", answer.reason) if isinstance(answer, children.Died) else answer


def _shape(name: str) -> Shape:
    return next(shape for shape in kinds() if shape.name == name)


def _made(shape: Shape) -> tuple[nn.Module, dict[str, Any]]:
    """The same each time."""
    torch.manual_seed(0)
    return shape.build().eval(), shape.example()


class _Asked:
    """The user's own module as the oracle asks it.

    Which of the tensors it returns is which output of the bundle, and in which axes, is found by comparing: export's
    own opinion of that is not asked.
    """

    def __init__(self, shape: Shape, found: bundle.Bundle) -> None:
        self._shape, (_, self._example) = shape, _made(shape)
        self._batch_first = shape.options.get("batch_first", True)
        self._state = shape.options.get("state", {})
        self._graph = Graph(found)
        specs = found.manifest.inputs
        arrays = {spec.name: self._major(self._example[spec.name]) for spec in specs}
        self._unbatched = any(arrays[spec.name].ndim == 1 + len(spec.shape) for spec in specs)
        if self._unbatched:
            arrays = {name: array[None] for name, array in arrays.items()}
        static = {spec.name: self._example[spec.name].numpy() for spec in found.manifest.static}
        limits = {spec.name: spec.limit for spec in (*specs, *found.manifest.static) if spec.limit is not None}
        self._samples = Samples(arrays, limits, static=static)
        self._manifest = found.manifest
        self._places: dict[str, tuple[int, tuple[int, ...]]] | None = None

    def draw(self, batch: int, time: int, rng: np.random.Generator) -> Arrays:
        series = self._samples.draw(batch, time, int(rng.integers(2**31)))
        return series | {
            name: array[rng.integers(0, len(array), batch)] for name, array in self._samples.static.items()
        }

    def answer(self, inputs: Arrays, double: bool) -> Arrays:
        if self._unbatched:
            rows = range(len(next(iter(inputs.values()))))
            alone = [self._call({name: array[row] for name, array in inputs.items()}, double) for row in rows]
            returned = [torch.stack(tensors) for tensors in zip(*alone, strict=True)]
        else:
            returned = self._call(inputs, double)
        if self._places is None:
            outputs, _ = self._graph.run(inputs, self._graph.start(inputs))
            self._places = {name: _nearest(array, returned) for name, array in outputs.items()}
        return {name: returned[index].permute(axes).numpy() for name, (index, axes) in self._places.items()}

    def _major(self, value: Any) -> np.ndarray:
        if isinstance(value, PackedSequence):
            return pad_packed_sequence(value, batch_first=True)[0].numpy()
        return (value if self._batch_first else value.transpose(0, 1)).numpy()

    def _call(self, inputs: Arrays, double: bool) -> list[Tensor]:
        """The arguments of forward: packed if the example's are; non-inputs as in the example."""
        size = inputs[self._manifest.inputs[0].name].shape[:2]
        static = {spec.name for spec in self._manifest.static}
        arguments = dict(self._example)
        for name, value in self._example.items():
            if name not in inputs:
                arguments[name] = _rows(value, size[0]) if name in self._state else _resized(value, *size)
                continue
            tensor = torch.from_numpy(inputs[name])
            tensor = tensor.double() if double and tensor.is_floating_point() else tensor
            if isinstance(value, PackedSequence):
                arguments[name] = pack_padded_sequence(tensor, torch.full(size[:1], size[1]), batch_first=True)
            else:
                arguments[name] = tensor if self._batch_first or name in static else tensor.transpose(0, 1)
        if double:
            arguments = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments)
        module, _ = _made(self._shape)  # as it was before any call
        module = getattr(module, "_orig_mod", module)
        module = module.double() if double else module
        with torch.no_grad(), double_precision() if double else nullcontext():
            return [tensor for _, tensor in leaves(module(**arguments))]


def _rows(value: Any, batch: int) -> Any:
    """A state, (batch, ...) with rows alike, for another batch."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[:1].expand(batch, *tensor.shape[1:]), value)


def _resized(value: Any, batch: int, time: int) -> Any:
    """Lengths that are all of it, or a state, (layers, batch, hidden) with rows alike, for another batch."""

    def one(tensor: Tensor) -> Tensor:
        if tensor.dim() == 1 and not tensor.is_floating_point():
            return torch.full((batch,), time, dtype=tensor.dtype)
        return tensor[:, :1].expand(-1, batch, -1).contiguous() if tensor.dim() == 3 else tensor

    return pytree.tree_map_only(Tensor, one, value)


def _nearest(array: np.ndarray, returned: list[Tensor]) -> tuple[int, tuple[int, ...]]:
    """Which tensor, permuted how, is nearest to the bundle's output."""
    found = [
        (float(np.abs(tensor.permute(axes).numpy().astype(np.float64) - array).max()), index, axes)
        for index, tensor in enumerate(returned)
        for axes in itertools.permutations(range(tensor.dim()))
        if tensor.permute(axes).shape == array.shape
    ]
    if not found:
        raise Wrong(f"nothing that forward returns is {array.shape}")
    _, index, axes = min(found)
    return index, axes
