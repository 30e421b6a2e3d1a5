"""Measures one row of the matrix: a kind of module with export and the oracle, and with `torch.onnx.export`."""

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

from conformance import children, draws, plain_export
from conformance.kinds import kinds
from conformance.kinds.kind import Kind
from conformance.oracle import Arrays, Graph, Wrong, examine
from unroll import bundle
from unroll.bundle.graph import operators
from unroll.export import ExportError, export
from unroll.export.lifting.float64 import double_precision
from unroll.export.signature.outputs import leaves

#: Operators that only move values.
PLUMBING = {"Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity", "Range"} | {
    "Reshape",
    "Kind",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}


@dataclass(frozen=True)
class Exported:
    """The result of exporting a kind.

    Attributes:
        outcome: as for a random model.
        bits: whether every bit is independent of chunks and neighbours; None if it does not stream.
    """

    outcome: str
    says: str = ""
    error: float | None = None
    bits: bool | None = None
    nodes: str = ""


def measure_export(name: str) -> Exported:
    kind = _kind(name)
    module, example = _made(kind)
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = export(module, example, name="m", repository=folder, **kind.options)
        except ExportError as error:
            return Exported("crashed" if error.code == "internal" else "refused", f"`{error.code}`: {error}")
        except Exception as error:  # noqa: BLE001 any other exception is a finding
            return Exported("crashed", f"{type(error).__name__}: {error}")
        manifest = report.manifest
        counted = operators((report.path / "model.onnx").read_bytes())
        nodes = ", ".join(f"{count} {op}" for op, count in counted.items() if op not in PLUMBING)
        try:
            asked = _OwnModule(kind, bundle.read(report.path))
            found = examine(report.path, asked.answer, asked.draw)
        except Wrong as error:
            return Exported("wrong", str(error), nodes=nodes)
        if manifest.streamable:
            return Exported("streams", "", found.error, found.bits, nodes)
        return Exported("whole only", str(manifest.not_streamable_because), found.error, found.bits, nodes)


def measure_plain(job: tuple[str, bool]) -> plain_export.Verdict:
    name, dynamo = job
    kind = _kind(name)
    _, example = _made(kind)
    return plain_export.judge(lambda: _made(kind)[0], example, kind.options.get("batch_first", True), dynamo)


@dataclass(frozen=True)
class Row:
    name: str
    exported: Exported
    dynamo: plain_export.Verdict
    torchscript: plain_export.Verdict


def measure(names: list[str], workers: int = 2) -> list[Row]:
    """Measure each kind with three exporters, each in its own process."""
    jobs: list[Any] = [(name, how) for name in names for how in ("export", True, False)]
    found = {}
    for job, answer in children.run(_one, jobs, children=workers, seconds=300):
        found[job] = answer
        print(f"\r{len(found)} of {len(jobs)}", end="", file=sys.stderr, flush=True)
    return [
        Row(name, _exported(found[name, "export"]), *(_plain(found[name, how]) for how in (True, False)))
        for name in names
    ]


def _one(job: tuple[str, Any]) -> Any:
    return measure_export(job[0]) if job[1] == "export" else measure_plain(job)


def _exported(answer: Any) -> Exported:
    return Exported("crashed", answer.reason) if isinstance(answer, children.Died) else answer


def _plain(answer: Any) -> plain_export.Verdict:
    return plain_export.Verdict("fails", answer.reason) if isinstance(answer, children.Died) else answer


def _kind(name: str) -> Kind:
    return next(kind for kind in kinds() if kind.name == name)


def _made(kind: Kind) -> tuple[nn.Module, dict[str, Any]]:
    """Build the module and its example, with fixed random numbers."""
    torch.manual_seed(0)
    return kind.build().eval(), kind.example()


class _OwnModule:
    """Adapts the user's own module to the oracle.

    It matches the module's tensors with the bundle's outputs, and their axes, by comparing values, independently of
    export.
    """

    def __init__(self, kind: Kind, found: bundle.Bundle) -> None:
        self._kind, (_, self._example) = kind, _made(kind)
        self._batch_first = kind.options.get("batch_first", True)
        self._state = kind.options.get("state", {})
        self._graph = Graph(found)
        specs = found.manifest.inputs
        arrays = {spec.name: self._major(self._example[spec.name]) for spec in specs}
        self._unbatched = any(arrays[spec.name].ndim == 1 + len(spec.shape) for spec in specs)
        if self._unbatched:
            arrays = {name: array[None] for name, array in arrays.items()}
        static = {spec.name: self._example[spec.name].numpy() for spec in found.manifest.static}
        self.draw = draws.like(arrays, static, found.manifest)
        self._manifest = found.manifest
        self._places: dict[str, tuple[int, tuple[int, ...]]] | None = None

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
        size = next(iter(inputs.values())).shape[:2]
        return {name: self._in_order(name, returned[index], axes, size) for name, (index, axes) in self._places.items()}

    def _in_order(self, name: str, tensor: Tensor, axes: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
        """Move batch and time to the front, and restore axes of size 1 that forward squeezed."""
        if tensor.dim() < len(axes):
            (spec,) = (spec for spec in self._manifest.outputs if spec.name == name)
            whole = (*(size if spec.time else size[:1]), *spec.shape)
            tensor = tensor.reshape([whole[axes.index(axis)] for axis in range(len(axes))])
        return tensor.permute(axes).numpy()

    def _major(self, value: Any) -> np.ndarray:
        if isinstance(value, PackedSequence):
            return pad_packed_sequence(value, batch_first=True)[0].numpy()
        return (value if self._batch_first else value.transpose(0, 1)).numpy()

    def _call(self, inputs: Arrays, double: bool) -> list[Tensor]:
        """Call forward. Inputs are packed if the example's are; other arguments are as in the example."""
        size = inputs[self._manifest.inputs[0].name].shape[:2]
        static = {spec.name for spec in self._manifest.static}
        arguments = dict(self._example)
        for name, value in self._example.items():
            if name not in inputs:
                arguments[name] = _rows(value, size[0]) if name in self._state else _resized(value, *size)
                continue
            tensor = torch.from_numpy(inputs[name].copy())  # forward may modify it
            tensor = tensor.double() if double and tensor.is_floating_point() else tensor
            if isinstance(value, PackedSequence):
                arguments[name] = pack_padded_sequence(tensor, torch.full(size[:1], size[1]), batch_first=True)
            else:
                arguments[name] = tensor if self._batch_first or name in static else tensor.transpose(0, 1)
        if double:
            arguments = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments)
        module, _ = _made(self._kind)  # a fresh module, not called before
        module = getattr(module, "_orig_mod", module)
        if double:
            module.double()
        with torch.no_grad(), double_precision() if double else nullcontext():
            return [tensor for _, tensor in leaves(module(**arguments))]


def _rows(value: Any, batch: int) -> Any:
    """Resize a state (batch, ...) with equal rows to another batch size."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[:1].expand(batch, *tensor.shape[1:]), value)


def _resized(value: Any, batch: int, time: int) -> Any:
    """Resize full lengths, or a state (layers, batch, hidden) with equal rows, to another batch size."""

    def one(tensor: Tensor) -> Tensor:
        if tensor.dim() == 1 and not tensor.is_floating_point():
            return torch.full((batch,), time, dtype=tensor.dtype)
        return tensor[:, :1].expand(-1, batch, -1).contiguous() if tensor.dim() == 3 else tensor

    return pytree.tree_map_only(Tensor, one, value)


def _nearest(array: np.ndarray, returned: list[Tensor]) -> tuple[int, tuple[int, ...]]:
    """The index and permutation of the tensor that is nearest to the bundle's output."""
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
