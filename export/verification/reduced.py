"""A graph in reduced precision: its error is measured, and stated as the manifest's tolerance."""

import copy
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch

from unroll.bundle import Golden, Manifest, Parity, RunFunction, Verifier
from unroll.bundle.golden import Arrays
from unroll.bundle.manifest import Precision
from unroll.bundle.verification import differences, select_rows
from unroll.export.errors import ExportError, first_line
from unroll.export.lifting.streaming import StreamingModule
from unroll.export.onnx.precision import reduced_graph
from unroll.export.onnx.runtime import onnx_runner
from unroll.export.signature.samples import Samples, as_tensors
from unroll.export.verification import probes

#: Another processor, or other rows beside it, may round otherwise than those that were measured.
_MARGIN = 2.0

#: Steps of the sequence over which an error may add up.
_LONG = 256


def reduce(
    graph: onnx.ModelProto,
    precision: Precision,
    streaming: StreamingModule,
    reference: RunFunction,
    golden: Golden,
    samples: Samples,
    manifest: Manifest,
) -> tuple[bytes, Manifest]:
    """The bytes of `graph` in `precision`, and the manifest with its error in place of float32's.

    The bound it states is twice what onnxruntime is off here, and in float16 at least 4 times what PyTorch itself is
    off in float16, since a GPU does not compute as the CPU does. Raises ExportError(precision).
    """
    content = reduced_graph(graph, precision)
    try:
        served = onnx_runner(content, streaming)
        measured = _error(served, reference, golden, samples, manifest)
        bounds = {name: _MARGIN * error for name, error in measured.items()}
        if precision == "float16":
            own = _error(_half_runner(streaming), reference, golden, samples, manifest)
            bounds = {name: max(bound, 4 * own[name]) for name, bound in bounds.items()}
        padding = probes.padding_differs(served, samples, manifest)
    except ExportError as error:
        raise ExportError("precision", f"{precision}: {error}") from error
    parity = tuple(_entry(entry, measured[entry.output], bounds[entry.output]) for entry in manifest.parity)
    ragged = manifest.ragged and all(padding[entry.output] <= entry.tolerance for entry in parity)
    exact = probes.is_bit_exact(served, samples, manifest) and not (ragged and any(padding.values()))
    return content, replace(manifest, precision=precision, parity=parity, ragged=ragged, bit_exact=exact)


def limit(manifest: Manifest, most: float | None) -> Manifest:
    """With no output's tolerance above `most`. Raises ExportError(max_error) if one is off by more already."""
    if most is None:
        return manifest
    outputs = {spec.name for spec in manifest.outputs}
    for entry in manifest.parity:
        if entry.output in outputs and not entry.onnxruntime <= most:
            raise ExportError(
                "max_error",
                f"output {entry.output!r} in {manifest.precision} differs from PyTorch in float64 by "
                f"{entry.onnxruntime:.3g}, and may by {most:.3g}",
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
    """PyTorch itself in float16."""
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


def _error(
    run: RunFunction, reference: RunFunction, golden: Golden, samples: Samples, manifest: Manifest
) -> dict[str, float]:
    """Largest absolute difference of `run` from `reference` by output and `state_out`.

    Over the golden sequences however they are cut, others in a large batch and each alone, since integers are scaled by
    what the whole batch holds, and long ones.
    """
    verifier = Verifier(run, manifest)
    worst = dict.fromkeys([*golden.outputs, "state_out"], 0.0)

    def compare(found: Arrays, expected: Arrays) -> None:
        for name, value in differences(found, expected).items():
            worst[name] = max(worst[name], value if np.isfinite(value) else np.inf)

    for _, found in verifier.replayed(golden):
        compare(found, golden.expected)
    for batch, steps in ((32, golden.time), (2, _LONG)):
        inputs, state = samples.draw(batch, steps, seed=81), samples.rows(batch, manifest, seed=82)
        expected = Verifier(reference, manifest).whole(inputs, state)
        compare(verifier.whole(inputs, state), expected)
        for row in range(0, batch, 4):
            one = slice(row, row + 1)
            compare(verifier.whole(select_rows(inputs, one), state[one]), select_rows(expected, one))
    return worst
