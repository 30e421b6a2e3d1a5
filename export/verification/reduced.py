"""Reduces a graph's precision, measures its error, and states it as the manifest's tolerance."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch

from unroll.bundle import Golden, Manifest, Parity, RunFunction
from unroll.bundle.golden import Arrays
from unroll.bundle.manifest import Precision
from unroll.bundle.verification import Differences, differences, select_rows
from unroll.export.errors import ExportError, first_line
from unroll.export.lifting.streaming import StreamingModule
from unroll.export.onnx.precision import reduced_graph
from unroll.export.onnx.runtime import onnx_runner
from unroll.export.signature.samples import as_tensors
from unroll.export.verification import probes, trials
from unroll.export.verification.trials import Subject

#: Safety factor: another processor, or other rows in the batch, may round differently.
_MARGIN = 2.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """The content of a bundle before it is written: the bytes of the graph, the golden vectors, the manifest."""

    content: bytes
    golden: Golden
    manifest: Manifest


def reduce(
    graph: onnx.ModelProto, precision: Precision, candidate: Candidate, streaming: StreamingModule, reference: Subject
) -> Candidate:
    """Rebuild the candidate from `graph` in `precision`, with the error of that precision.

    The manifest's bound is twice the error of onnxruntime measured here. In float16 it is also at least 4 times
    PyTorch's own float16 error, since GPU and CPU compute differently.

    Raises:
        ExportError: precision, if the model cannot be reduced.
    """
    content, manifest, golden = reduced_graph(graph, precision), candidate.manifest, candidate.golden
    try:
        served = replace(reference, run=onnx_runner(content, streaming), manifest=manifest)
        reference = replace(reference, manifest=manifest)
        measured = _error(served, reference, golden)
        bounds = {name: _MARGIN * error for name, error in measured.items()}
        if precision == "float16":
            own = _error(replace(served, run=_half_runner(streaming)), reference, golden)
            bounds = {name: max(bound, 4 * own[name]) for name, bound in bounds.items()}
        parity = tuple(_entry(entry, measured[entry.output], bounds[entry.output]) for entry in manifest.parity)
        manifest = probes.with_batching(served, replace(manifest, precision=precision, parity=parity))
    except ExportError as error:
        raise ExportError("precision", f"{precision}: {error}") from error
    return Candidate(content, golden, manifest)


def limit(manifest: Manifest, most: float | None) -> Manifest:
    """Cap every output's tolerance at `most`.

    Raises:
        ExportError: max_error, if the error of an output is larger.
    """
    if most is None:
        return manifest
    outputs = {spec.name for spec in manifest.outputs}
    for entry in manifest.parity:
        if entry.output in outputs and not entry.onnxruntime <= most:
            raise ExportError(
                "max_error",
                f"output {entry.output!r} in {manifest.precision} differs from PyTorch in float64 by "
                f"{entry.onnxruntime:.3g}, and max_error is {most:.3g}",
            )
    return replace(
        manifest,
        parity=tuple(
            replace(entry, tolerance=min(entry.tolerance, most)) if entry.output in outputs else entry
            for entry in manifest.parity
        ),
    )


def _entry(entry: Parity, measured: float, bound: float) -> Parity:
    return replace(entry, onnxruntime=measured, tolerance=max(bound, entry.tolerance))


def _half_runner(streaming: StreamingModule) -> RunFunction:
    """Run PyTorch itself in float16."""
    module = copy.deepcopy(streaming).half()

    def run(inputs: Arrays, state: np.ndarray, sequence_lens: np.ndarray) -> tuple[Arrays, np.ndarray]:
        tensors = [
            tensor.half() if tensor.is_floating_point() else tensor
            for tensor in as_tensors({"": state} | inputs, double=False).values()
        ]
        try:
            with _default(torch.float16), torch.no_grad():
                *outputs, after = module(tensors[0], None, *tensors[1:])
        except Exception as error:
            raise ExportError("precision", f"PyTorch cannot run it in float16: {first_line(error)}") from error
        arrays = [o.float().numpy() if o.is_floating_point() else o.numpy() for o in outputs]
        return {o.spec.name: array for o, array in zip(module.outputs, arrays, strict=True)}, after.float().numpy()

    return run


@contextmanager
def _default(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _error(found: Subject, reference: Subject, golden: Golden) -> Differences:
    """The largest absolute difference of `found` from `reference`, by output and for `state_out`.

    Measured over the golden sequences with every chunking, and over further and longer sequences, each in a batch and
    by itself: quantized graphs scale integers by the range of the whole batch.
    """
    worst = dict.fromkeys([*golden.outputs, "state_out"], 0.0)

    def compare(answers: Arrays, expected: Arrays) -> None:
        for name, value in differences(answers, expected).items():
            worst[name] = max(worst[name], value if np.isfinite(value) else np.inf)

    for _, answers in found.replayed(golden):
        compare(answers, golden.expected)
    for trial in (replace(trials.REDUCED_LONG, batch=trials.REDUCED_BATCH, time=golden.time), trials.REDUCED_LONG):
        inputs, state = found.inputs(trial), found.rows(trial)
        expected = reference.whole(inputs, state)
        compare(found.whole(inputs, state), expected)
        for row in range(0, trial.batch, 4):
            one = slice(row, row + 1)
            compare(found.whole(select_rows(inputs, one), state[one]), select_rows(expected, one))
    return worst
