"""The export from a trained module to a proven bundle, stage by stage. Nothing is written before the last one."""

import copy
import dataclasses
import importlib.metadata
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bundle
from bundle import BundleError, Manifest, Precision, TensorSpec
from bundle.files import check_name
from bundle.golden import run_chunked
from export import onnx_graph, parity, probes, refusals
from export.double import double_precision, in_float64
from export.errors import ExportError
from export.inputs import check_arguments
from export.observe import in_double, lift_model, observe
from export.outputs import DTYPES, leaves
from export.precision import limit, reduce
from export.report import Report
from export.samples import Samples, as_tensors
from export.streaming import StreamingModule, attempt, torch_runner

Progress = Callable[[str], None]


def export(
    module: nn.Module,
    example_inputs: dict[str, Any],
    *,
    name: str,
    version: str = "1",
    repository: Path | str,
    replace: bool = False,
    batch_first: bool = True,
    output_names: list[str] | None = None,
    precision: Precision = "float32",
    max_error: float | None = None,
    progress: Progress = lambda stage: None,
) -> Report:
    """Write `module` as the bundle `<repository>/<name>/<version>`, proven equal to PyTorch.

    example_inputs: by forward's argument names, each (batch, time, ...), or (time, batch, ...) if not `batch_first`;
    the values set the scale of the inputs that parity is proven on. A state given here becomes the initial state.
    output_names: for the outputs in forward's order. replace: write over an existing bundle. progress: called with a
    line per stage. precision: what the graph shall compute in: float16 for a GPU, int8 for the CPU; inputs, outputs and
    state stay float32. max_error: the most that an output may differ from PyTorch in float64, absolute.

    Raises ExportError with a code and what to change; then nothing is written. `module` is not changed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        return _export(
            module,
            example_inputs,
            name,
            version,
            Path(repository),
            replace,
            batch_first,
            output_names,
            precision,
            max_error,
            progress,
        )


def _export(
    module: nn.Module,
    example_inputs: dict[str, Any],
    name: str,
    version: str,
    repository: Path,
    replace: bool,
    batch_first: bool,
    output_names: list[str] | None,
    precision: Precision,
    max_error: float | None,
    progress: Progress,
) -> Report:
    _check_target(repository, name, version, replace)
    progress("reading the model")
    refusals.check_modules(module)
    model = _copy(module)
    example = {key: _detached(value) for key, value in example_inputs.items() if value is not None}
    check_arguments(model, example)
    original = copy.deepcopy(model)

    progress("running it as it is")
    returned = attempt("the example", lambda: refusals.check_steady(original, lambda: original(**example)))
    refusals.check_finite(leaves(returned))
    streaming, samples = lift_model(model, example, batch_first)
    double = in_double(streaming, samples)
    initial, dropped = observe(streaming, double, samples, output_names)

    progress("tracing it into ONNX")
    graph, suspects = onnx_graph.to_onnx(streaming, samples.draw(3, 5, seed=1))
    content = graph.SerializeToString()
    served = onnx_graph.onnx_runner(content, streaming)
    samples = dataclasses.replace(samples, limits=_integer_limits(graph, samples))
    reference, single = torch_runner(double, double=True), torch_runner(streaming, double=False)

    progress("finding out whether it streams")
    draft = _draft(name, version, streaming, samples, initial)
    _check_same_as_original(original, double, samples, draft)
    probes.check_rows(reference, samples, draft)
    reason = probes.why_not_streamable(torch_runner(double, double=True, ops=True), double, samples, draft)
    if reason is None:
        reason = probes.why_not_over_long(served, samples, draft)
    draft = dataclasses.replace(draft, streamable=reason is None, not_streamable_because=reason)

    progress("proving it equal to PyTorch")
    golden = parity.make_golden(reference, samples, draft)
    draft = dataclasses.replace(draft, parity=parity.prove(golden, reference, single, served, samples, draft, suspects))
    padding = probes.padding_differs(served, samples, draft)
    ragged = all(padding[entry.output] <= entry.tolerance for entry in draft.parity)
    exact = probes.is_bit_exact(served, samples, draft) and not (ragged and any(padding.values()))
    draft = dataclasses.replace(draft, ragged=ragged, bit_exact=exact)

    if precision != "float32":
        progress(f"reducing it to {precision} and measuring what that costs")
        content, draft = reduce(graph, precision, streaming, reference, golden, samples, draft)
    draft = limit(draft, max_error)

    progress("writing the bundle")
    try:
        path = bundle.write(repository, draft, content, golden, replace_existing=replace)
        manifest = bundle.read(path).manifest
    except BundleError as error:
        raise ExportError("bundle", str(error)) from error
    return Report(path, manifest, _notes(streaming, samples, dropped))


def _check_target(repository: Path, name: str, version: str, replace: bool) -> None:
    try:
        check_name(name, version)
    except BundleError as error:
        raise ExportError("bundle", str(error)) from None
    if (repository / name / version).exists() and not replace:
        raise ExportError(
            "bundle", f"{repository / name / version} exists; choose another version or ask to replace it"
        )


def _copy(module: nn.Module) -> nn.Module:
    """On the CPU, in eval mode, without gradients; unwrapped if it was compiled."""
    module = getattr(module, "_orig_mod", module)
    try:
        with torch.no_grad():  # else what weight_norm computes is a tensor that cannot be copied again
            return copy.deepcopy(module).cpu().eval().requires_grad_(False)
    except Exception as error:
        raise ExportError(
            "not_copyable", f"the module cannot be copied (does it hold a tensor of its last training step?): {error}"
        ) from error


def _detached(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), value)


def _integer_limits(graph: onnx.ModelProto, samples: Samples) -> dict[str, int]:
    """Raises ExportError(input) where neither an embedding nor the example gives more than one value to try."""
    integers = {name: array for name, array in samples.example.items() if array.dtype.kind == "i"}
    limits = {name: limit for name, limit in onnx_graph.index_limits(graph).items() if name in integers}
    for name, array in integers.items():
        if name not in limits and (array == array.flat[0]).all():
            raise ExportError("input", f"the example of {name!r} holds one value only; give the values it may take")
    return limits


def _draft(name: str, version: str, streaming: StreamingModule, samples: Samples, initial: np.ndarray) -> Manifest:
    """The manifest before anything is proven."""
    inputs = tuple(
        TensorSpec(key, DTYPES[torch.from_numpy(array).dtype], array.shape[2:], True, samples.limits.get(key))
        for key, array in samples.example.items()
    )
    return Manifest(
        format=1,
        name=name,
        version=version,
        inputs=inputs,
        outputs=tuple(output.spec for output in streaming.outputs),
        state=streaming.layout.slots,
        state_size=streaming.layout.size,
        initial_state=tuple(initial.tolist()) if initial.any() else None,
        streamable=False,
        not_streamable_because="not tried",
        ragged=False,
        bit_exact=False,
        parity=(),
        files={},
        tools={
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "unroll": importlib.metadata.version("unroll"),
            "opset": str(onnx_graph.OPSET),
        },
    )


def _check_same_as_original(original: nn.Module, double: StreamingModule, samples: Samples, draft: Manifest) -> None:
    """The lifted copy, started from the initial state, must still be the user's model: both in float64."""
    user = in_float64(original)
    for batch, time in ((3, 10), (2, 23)):
        inputs = samples.draw(batch, time, seed=25)
        rows = np.repeat(draft.initial_row()[None], batch, axis=0)
        lifted = run_chunked(inputs, rows, (time,), draft, torch_runner(double, double=True))
        tensors = tuple(as_tensors(inputs, double=True).values())
        with double_precision():
            returned = attempt("other inputs", partial(double.ask, user, tensors))
        for output in double.outputs:
            expected = output.batch_major(returned[output.index][1]).numpy()
            if not np.allclose(lifted[output.spec.name], expected, rtol=1e-9, atol=1e-9):
                raise ExportError(
                    "parity", f"output {output.spec.name!r} changes when the layers' state is handed in from outside"
                )


def _notes(streaming: StreamingModule, samples: Samples, dropped: list[str]) -> tuple[str, ...]:
    notes = [f"output {name!r} is the final state itself: it is part of state_out, not an output" for name in dropped]
    notes += [
        f"input {name!r} is the initial state: it is kept in the manifest, not an input"
        for name in streaming.arguments.constants
    ]
    notes += [
        f"output {output.spec.name!r} is returned as (batch, {'time, ' if output.time is not None else ''}...)"
        for output in streaming.outputs
        if output.batch != 0 or output.time not in {None, 1}
    ]
    notes += [
        f"input {name!r} indexes no embedding that could be found: its values are not checked"
        for name, array in samples.example.items()
        if array.dtype.kind == "i" and name not in samples.limits
    ]
    return tuple(notes)
