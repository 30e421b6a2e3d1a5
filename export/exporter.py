"""The export from a trained module to a proven bundle, stage by stage. Nothing is written before the last one."""

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from unroll import __version__, bundle
from unroll.bundle import BundleError, Manifest, Precision, StaticInput, TensorSpec, Verifier
from unroll.bundle.files import check_name
from unroll.export.errors import ExportError, attempt
from unroll.export.lifting import module_state
from unroll.export.lifting.carried_state import Carried
from unroll.export.lifting.float64 import converted, double_precision
from unroll.export.lifting.history import Place
from unroll.export.lifting.lift import in_double, lift_model
from unroll.export.lifting.module_state import Attribute
from unroll.export.lifting.observe import find_kept, find_past, observe
from unroll.export.lifting.streaming import StreamingModule, torch_runner
from unroll.export.loading import programs
from unroll.export.onnx.graph import OPSET, to_onnx
from unroll.export.onnx.index_limits import index_limits
from unroll.export.onnx.runtime import onnx_runner
from unroll.export.report import Report
from unroll.export.signature.arguments import check_arguments
from unroll.export.signature.outputs import DTYPES, leaves
from unroll.export.signature.samples import Samples, as_tensors
from unroll.export.verification import parity, preconditions, probes
from unroll.export.verification.reduced import limit, reduce

Progress = Callable[[str], None]


def export(
    module: nn.Module | ExportedProgram,
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
    static: Collection[str] = (),
    state: Mapping[str, str] = MappingProxyType({}),
    progress: Progress = lambda stage: None,
) -> Report:
    """Write `module` as the bundle `<repository>/<name>/<version>`, proven equal to PyTorch.

    example_inputs: by forward's argument names, each (batch, time, ...), or (time, batch, ...) if not `batch_first`;
    the values set the scale of the inputs that parity is proven on. A state given here becomes the initial state.
    static: the inputs that have no time, (batch, ...), and are given once when a sequence begins.
    state: the inputs that forward hands on itself, as a cache is, each with the name of the output that is handed to
    the next call: `y1` is the second of a tuple. Their example, alike in every row, is what a sequence starts from.
    output_names: for the outputs in forward's order. replace: write over an existing bundle. progress: called with a
    line per stage. precision: what the graph shall compute in: float16 for a GPU, int8 for the CPU; inputs, outputs and
    state stay float32. max_error: the most that an output may differ from PyTorch in float64, absolute.

    Raises ExportError with a code and what to change; then nothing is written. `module` is not changed.
    """
    repository = Path(repository)
    _check_target(repository, name, version, replace)
    progress("reading the model")
    module = programs.as_module(module, example_inputs)
    preconditions.check_modules(module)
    model = _copy(module)
    example = {key: _detached(value) for key, value in example_inputs.items() if value is not None}
    exact, stored = converted(model, torch.float64), preconditions.precision(model)
    if stored != torch.float32:
        model, example = converted(model, torch.float32), _cast(example, stored)
    check_arguments(model, example)
    if missing := {*static, *state} - example.keys():
        raise ExportError("input", f"{', '.join(sorted(missing))} is not among the example inputs")

    progress("running it as it is")
    own = attempt("the example", partial(_own_state, model, example))
    module_state.PutBack(model, own)
    tried = copy.deepcopy(model)
    returned = attempt("the example", lambda: preconditions.check_steady(lambda: tried(**example), own))
    preconditions.check_finite(leaves(returned))
    streaming, samples = lift_model(model, example, frozenset(static), state, batch_first)
    double = in_double(streaming, exact, samples)
    found = find_past(streaming, samples)
    impossible = _keep_past(streaming, double, samples, found, own, output_names)
    initial, dropped = observe(streaming, double, samples, output_names)

    progress("tracing it into ONNX")
    graph, suspects = to_onnx(streaming, samples.draw(3, 5, seed=1))
    content = graph.SerializeToString()
    served = onnx_runner(content, streaming)
    samples = dataclasses.replace(samples, limits=_integer_limits(graph, streaming, samples))
    reference, single = torch_runner(double, double=True), torch_runner(streaming, double=False)

    progress("finding out whether it streams")
    draft = _draft(name, version, streaming, samples, initial)
    samples = probes.with_reached(reference, samples, draft)
    _check_same_as_original(exact, double, samples, draft, own)
    probes.check_rows(reference, samples, draft)
    reason = impossible or probes.why_not_streamable(
        torch_runner(double, double=True, ops=True), double, samples, draft
    )
    if reason is None:
        uncounted = not streaming.row_by_row and any(place and place.counted for place in found)
        reason = probes.why_not_over_long(served, samples, draft, probes.LONG * (16 if uncounted else 1))
    if own:
        if reason is not None:
            raise module_state.refusal(own)
        _check_goes_on(exact, double, samples, draft, own)
    draft = dataclasses.replace(draft, streamable=reason is None, not_streamable_because=reason)

    progress("proving it equal to PyTorch")
    golden = parity.make_golden(reference, samples, draft)
    draft = dataclasses.replace(draft, parity=parity.prove(golden, reference, single, served, samples, draft, suspects))
    padding = probes.padding_differs(served, samples, draft)
    ragged = all(padding[entry.output] <= entry.tolerance for entry in draft.parity)
    bit_exact = probes.is_bit_exact(served, samples, draft) and not (ragged and any(padding.values()))
    draft = dataclasses.replace(draft, ragged=ragged, bit_exact=bit_exact)

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
    return Report(path, manifest, _notes(streaming, samples, dropped, stored, own))


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
        with torch.no_grad():
            # A layer's normalised weight is a result of its parameters, which cannot be copied and is computed anew.
            computed = [w for m in module.modules() if isinstance(m, nn.RNNBase) for w in m._flat_weights]
            memo: dict[int, Any] = {id(w): w.detach() for w in computed if w is not None and not w.is_leaf}
            return copy.deepcopy(module, memo).cpu().eval().requires_grad_(False)
    except Exception as error:
        raise ExportError(
            "not_copyable", f"the module cannot be copied (does it hold a tensor of its last training step?): {error}"
        ) from error


def _own_state(model: nn.Module, example: dict[str, Any]) -> list[Attribute]:
    other = example
    if not any(isinstance(value, PackedSequence) for value in example.values()):
        other = pytree.tree_map_only(Tensor, lambda tensor: tensor.flip([*range(tensor.dim())][:2]), example)
    return module_state.state_of(copy.deepcopy(model), example, other)


def _detached(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), value)


def _cast(example: dict[str, Any], precision: torch.dtype) -> dict[str, Any]:
    """The example of a model in another precision, in float32."""
    return pytree.tree_map_only(Tensor, lambda t: t.float() if t.dtype == precision else t, example)


def _integer_limits(graph: onnx.ModelProto, streaming: StreamingModule, samples: Samples) -> dict[str, int]:
    """Raises ExportError(input) where neither an embedding nor the example gives more than one value to try."""
    given = samples.example | samples.static
    integers = {name: array for name, array in given.items() if array.dtype.kind == "i"}
    limits = index_limits(graph, streaming.layout)
    for name, array in integers.items():
        if name not in limits and (array == array.flat[0]).all():
            raise ExportError("input", f"the example of {name!r} holds one value only; give the values it may take")
    return {name: limit for name, limit in limits.items() if name in integers}


def _draft(name: str, version: str, streaming: StreamingModule, samples: Samples, initial: np.ndarray) -> Manifest:
    """The manifest before anything is proven."""
    inputs = tuple(
        TensorSpec(key, DTYPES[torch.from_numpy(array).dtype], array.shape[2:], True, samples.limits.get(key))
        for key, array in samples.example.items()
    )
    offsets = {slot.module: slot.offset for slot in streaming.layout.slots if slot.kind == "static"}
    static = tuple(
        StaticInput(key, DTYPES[value.dtype], tuple(value.shape[1:]), offsets[f"input {key}"], samples.limits.get(key))
        for key, value in streaming.arguments.static.items()
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
            "unroll": __version__,
            "opset": str(OPSET),
        },
        static=static,
    )


def _keep_past(
    streaming: StreamingModule,
    double: StreamingModule,
    samples: Samples,
    found: list[Place | None],
    own: list[Attribute],
    output_names: list[str] | None,
) -> str | None:
    """Keep what layers that are not recurrent need of the past, as much as was `found`, if with it the model streams.

    Less is tried only where more does not: what is needed a thousand steps later makes no difference before. Returns
    why a model that would stream does not, or None.
    """
    # Numbers that are counted may be of the sequence, or of this call only, as a mask's are.
    without_counts = [place if place and not place.counted else None for place in found]
    carried = find_kept(streaming, own, samples)
    reason = None
    for attributes, places in product((carried, {}) if carried else ({},), (found, without_counts)):
        _keep(attributes, places if any(places) else [], streaming, double)
        if (streaming.kept or streaming.places) and _streams(streaming, double, samples, output_names):
            if not streaming.row_by_row:
                return None
            try:
                to_onnx(streaming, samples.draw(3, 5, seed=1))
            except ExportError as error:
                reason = f"it counts time steps, and that could not be traced ({error})"
                break
            return None
    _keep({}, [], streaming, double)
    return reason


def _keep(attributes: dict[Attribute, Carried], places: list[Place | None], *modules: StreamingModule) -> None:
    for module in modules:
        module.kept, module.places = attributes, places


def _streams(
    streaming: StreamingModule, double: StreamingModule, samples: Samples, output_names: list[str] | None
) -> bool:
    run = torch_runner(double, double=True)
    try:
        initial, _ = observe(streaming, double, samples, output_names)
        draft = _draft("draft", "1", streaming, samples, initial)
        samples = probes.with_reached(run, samples, draft)
        return probes.why_not_streamable(run, double, samples, draft) is None
    except ExportError:
        return False


def _check_same_as_original(
    exact: nn.Module, double: StreamingModule, samples: Samples, draft: Manifest, own: list[Attribute]
) -> None:
    """The lifted copy, started from the initial state, must still be the user's model: both in float64."""
    for batch, time in ((3, 10), (2, 23)):
        inputs = samples.draw(batch, time, seed=25)
        rows = samples.begin(batch, draft, seed=26)
        lifted = Verifier(torch_runner(double, double=True), draft).whole(inputs, rows)
        tensors = tuple(as_tensors(inputs, double=True).values())
        with double_precision():
            original = _copy(exact) if own else exact
            returned = attempt("other inputs", partial(double.ask, original, tensors, torch.from_numpy(rows).double()))
        for output in double.outputs:
            expected = output.batch_major(returned[output.index][1]).numpy()
            if not np.allclose(lifted[output.spec.name], expected, rtol=1e-9, atol=1e-9):
                raise ExportError(
                    "parity", f"output {output.spec.name!r} changes when the layers' state is handed in from outside"
                )


def _check_goes_on(
    exact: nn.Module, double: StreamingModule, samples: Samples, draft: Manifest, own: list[Attribute]
) -> None:
    """The user's own module, which keeps a state of its `own` between calls, must go on as the bundle does."""
    inputs, rows = samples.draw(2, 10, seed=27), samples.begin(2, draft, seed=28)
    lifted = Verifier(torch_runner(double, double=True), draft).whole(inputs, rows)
    original, pieces = _copy(exact), []
    for start, end in ((0, 4), (4, 5), (5, 10)):
        tensors = tuple(as_tensors({n: a[:, start:end] for n, a in inputs.items()}, double=True).values())
        with double_precision():
            pieces.append(
                attempt("a second call", partial(double.ask, original, tensors, torch.from_numpy(rows).double()))
            )
    for output in double.outputs:
        parts = [output.batch_major(piece[output.index][1]).numpy() for piece in pieces]
        found = np.concatenate(parts, 1) if output.time is not None else parts[-1]
        if not np.allclose(lifted[output.spec.name], found, rtol=1e-9, atol=1e-9):
            raise module_state.refusal(own)


def _notes(
    streaming: StreamingModule,
    samples: Samples,
    dropped: list[str],
    precision: torch.dtype,
    own: list[Attribute],
) -> tuple[str, ...]:
    notes = [f"output {name!r} is the final state itself: it is part of state_out, not an output" for name in dropped]
    if own:
        notes.append(
            f"what forward keeps in the module ({module_state.described(own)}) is part of the state, each client's own"
        )
    if precision != torch.float32:
        notes.append(f"the model is {str(precision).removeprefix('torch.')}, the bundle computes in float32")
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
        for name, array in (samples.example | samples.static).items()
        if array.dtype.kind == "i" and name not in samples.limits
    ]
    return tuple(notes)
