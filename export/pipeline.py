"""The stages from a trained module to a proven bundle. Stages exchange records; only the last one writes files."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import onnx
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.utils.rnn import PackedSequence

from unroll import bundle
from unroll.bundle import BundleError, Manifest
from unroll.export.errors import ExportError, attempt, unexpected
from unroll.export.lifting.complex_pairs import ComplexNumbers, in_pairs
from unroll.export.lifting.float64 import converted
from unroll.export.lifting.history import Place
from unroll.export.lifting.lift import lift
from unroll.export.lifting.lifted_model import LiftedModel
from unroll.export.lifting.module_state import (
    Attribute,
    RestoreAttributes,
    find_fitted,
    find_module_state,
    refusal,
)
from unroll.export.lifting.observe import Observation, find_history, keep_squeezes, observe
from unroll.export.lifting.streaming import torch_runner
from unroll.export.loading import programs
from unroll.export.loading.copies import as_float32, detached_copy, detached_example, keep_arguments, move_time
from unroll.export.loading.random_weights import random_states_kept
from unroll.export.onnx.graph import Trace, to_onnx
from unroll.export.onnx.runtime import onnx_runner
from unroll.export.onnx.tracing import Suspects
from unroll.export.options import ExportOptions, Progress
from unroll.export.report import Report, notes_on
from unroll.export.signature.arguments import check_arguments, check_types, resized
from unroll.export.signature.outputs import leaves
from unroll.export.signature.samples import Samples
from unroll.export.state_choice import choose_state
from unroll.export.step_form import over_time
from unroll.export.verification import decisions, parity, preconditions, probes
from unroll.export.verification.decisions import Decided, Undecided, decide, notes_on_ways
from unroll.export.verification.draft import draft_manifest
from unroll.export.verification.input_ranges import find_ranges, split_ranges
from unroll.export.verification.large_numbers import LargeNumber
from unroll.export.verification.long_sequences import LongSequences
from unroll.export.verification.original import check_continues, check_same_as_original
from unroll.export.verification.parity import Runners
from unroll.export.verification.reduced import Candidate, limit, reduce
from unroll.export.verification.trials import Subject

#: Models with fewer parameters run faster on one thread, because several would spin while they wait for each other.
_SMALL = 2**25


@contextmanager
def _few_threads(module: nn.Module | ExportedProgram) -> Iterator[None]:
    """Run a small model on one thread."""
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in module.parameters()) < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the garbage collector: it takes a tenth of the time, and almost everything that it looks at stays."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Prepared:
    """Copies of the user's model.

    Attributes:
        model: the copy in float32, which the next stage lifts in place.
        exact: the copy in float64.
        example: the arguments of forward.
        dtype: dtype of the user's parameters.
        attributes: the attributes that hold state for the next call.
        fitted: the attributes that forward adapts to the batch size or length.
    """

    model: nn.Module
    exact: nn.Module
    example: dict[str, Any]
    dtype: torch.dtype
    attributes: list[Attribute]
    fitted: list[Attribute] = field(default_factory=list)

    @property
    def is_changed(self) -> bool:
        """Does a call of forward modify the module?"""
        return bool(self.attributes or self.fitted)


@dataclass(frozen=True, slots=True)
class Lifted:
    """The lifted model, and observations of it.

    Attributes:
        model: the model in both precisions.
        history: where forward reads earlier time steps.
        not_streamable_because: a reason that is already known, or None.
        observation: its initial row and dropped outputs.
        trace: its graph, if the choice of its state already traced it.
        far: the largest number in the code that is a possible sequence length, or None.
    """

    model: LiftedModel
    history: list[Place | None]
    not_streamable_because: str | None
    observation: Observation
    trace: Trace | None
    far: LargeNumber | None = None


@dataclass(frozen=True, slots=True)
class Traced:
    """The graph, and all ways to run the model.

    Attributes:
        graph, content: the ONNX model, and its bytes.
        runners: PyTorch in both precisions, and the graph.
        suspects: sizes at which the trace may be wrong.
        samples: the lifted model's samples, with the limits of integer inputs.
    """

    graph: onnx.ModelProto
    content: bytes
    runners: Runners
    suspects: Suspects
    samples: Samples


@dataclass(frozen=True, slots=True)
class Judged:
    """The manifest, with the decision whether the model streams, and the samples for the proof."""

    manifest: Manifest
    samples: Samples


class Pipeline:
    """One export."""

    def __init__(self, options: ExportOptions, progress: Progress) -> None:
        self._options, self._progress = options, progress
        self._undecided = Undecided()

    def run(self, module: nn.Module | ExportedProgram, example_inputs: dict[str, Any]) -> Report:
        """Run all stages. Nothing is written if it raises ExportError."""
        try:
            check_types(module, example_inputs)
            preconditions.check_weights(module)
            with random_states_kept(), _few_threads(module), _uncollected(), programs.in_python():
                return self._run(module, example_inputs)
        except ExportError:
            raise
        except Exception as error:
            raise unexpected(error) from error

    def _run(self, module: nn.Module | ExportedProgram, example_inputs: dict[str, Any]) -> Report:
        self._options.check_target()
        self._progress("reading the model")
        if self._options.step:
            module, example_inputs = self._over_time(module, example_inputs)
        prepared = self._prepare(module, example_inputs)
        ways, self._undecided = decide(prepared.exact, prepared.example)
        with Decided(ways) if ways else nullcontext():
            report = self._export(prepared)
        return replace(report, notes=(*report.notes, *notes_on_ways(ways, self._undecided)))

    def _export(self, prepared: Prepared) -> Report:
        self._progress("running it as it is")
        try:
            prepared = self._find_state(prepared)
        except ExportError as error:
            raise preconditions.in_its_own_precision(error, prepared.dtype) from error
        lifted = self._lift(prepared)
        self._progress("tracing it into ONNX")
        traced = self._trace(lifted)
        self._progress("finding out whether it streams")
        judged = self._judge(prepared, lifted, traced)
        self._progress("proving it equal to PyTorch")
        candidate = self._prove(traced, judged)
        candidate = self._reduce(candidate, lifted, traced, judged)
        decisions.check(self._undecided)
        self._progress("writing the bundle")
        return self._write(candidate, prepared, lifted, judged)

    def _over_time(
        self, module: nn.Module | ExportedProgram, example_inputs: dict[str, Any]
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Turn a step module into a module over sequences, without states among its arguments."""
        declared = self._options.arguments
        self._options = replace(self._options, arguments=replace(declared, state={}))
        return over_time(programs.as_module(module, example_inputs), example_inputs, declared)

    def _prepare(self, module: nn.Module | ExportedProgram, example_inputs: dict[str, Any]) -> Prepared:
        plain = programs.as_module(module, example_inputs)
        preconditions.check_modules(plain)
        model, example = detached_copy(plain), detached_example(example_inputs)
        preconditions.check_copy(plain, model, example)
        declared = self._options.arguments
        if self._options.time_last:
            example = move_time(model, example, {*declared.static, *declared.state})
        numbers = ComplexNumbers()
        keep_arguments(model, example, numbers)
        if numbers.seen:
            packed = any(isinstance(value, PackedSequence) for value in example.values())
            others = () if packed else ((2, 3), (3, 8))
            model = in_pairs(model, [example, *(self._resized(example, size) for size in others)])
        exact, dtype = converted(model, torch.float64), preconditions.precision(model)
        if dtype != torch.float32:
            model, example = converted(model, torch.float32), as_float32(example, dtype)
        check_arguments(model, example)
        self._options.check_rates(example)
        preconditions.check_example(example, self._options.allow_nan)
        example = self._options.with_missing(example)
        if missing := {*declared.static, *declared.state} - example.keys():
            raise ExportError(
                "input", f"{', '.join(sorted(missing))} is in `static` or `state`, but not in the example inputs"
            )
        return Prepared(model, exact, example, dtype, [])

    def _find_state(self, prepared: Prepared) -> Prepared:
        """Find the attributes that hold state, and make the model restore them after every call."""
        model, example = prepared.model, prepared.example
        attributes = attempt("the example", partial(find_module_state, model, example, self._options.arguments.static))
        fitted = self._fitted(model, example)
        RestoreAttributes(model, sorted({*attributes, *fitted}))
        tried = copy.deepcopy(model)
        returned = attempt("the example", lambda: preconditions.check_steady(lambda: tried(**example), attributes))
        preconditions.check_finite(leaves(returned), self._options.allow_nan)
        return replace(prepared, attributes=attributes, fitted=fitted)

    def _fitted(self, model: nn.Module, example: dict[str, Any]) -> list[Attribute]:
        if any(isinstance(value, PackedSequence) for value in example.values()):
            return []

        def run(size: tuple[int, int], model: nn.Module) -> None:
            with torch.no_grad():
                model(**self._resized(example, size))

        return find_fitted(model, [partial(run, size) for size in ((2, 3), (3, 3), (2, 5))])

    def _resized(self, example: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        arguments = self._options.arguments
        return resized(example, size, arguments.static, arguments.batch_first)

    def _lift(self, prepared: Prepared) -> Lifted:
        model = lift(prepared.model, prepared.exact, prepared.example, self._options.arguments)
        keep_squeezes(model)
        history = find_history(model)
        reason, made = choose_state(model, history, prepared.attributes, self._options.output_names)
        lifted = Lifted(model, history, reason, observe(model, self._options.output_names), made)
        reference = Subject(torch_runner(model.double, double=True), self._draft(lifted, model.samples), model.samples)
        long = LongSequences(prepared.exact, model.double, reference, prepared.is_changed, self._progress)
        return replace(lifted, far=long.check_loops())

    def _trace(self, lifted: Lifted) -> Traced:
        single, double, samples = lifted.model.single, lifted.model.double, lifted.model.samples
        reference = Subject(torch_runner(double, double=True), self._draft(lifted, samples), samples)
        limits, ranges = split_ranges(find_ranges(reference), reference)
        single.ranges = double.ranges = ranges
        earlier = None if ranges else lifted.trace
        graph, suspects = earlier or to_onnx(single, samples.draw(3, 5, seed=1))
        content = graph.SerializeToString()
        served = onnx_runner(content, single)
        runners = Runners(torch_runner(double, double=True), torch_runner(single, double=False), served)
        return Traced(graph, content, runners, suspects, replace(samples, limits=limits))

    def _draft(self, lifted: Lifted, samples: Samples) -> Manifest:
        model = replace(lifted.model, samples=samples)
        draft = draft_manifest(self._options.name, self._options.version, model, lifted.observation.initial_row)
        return replace(draft, rates=dict(self._options.rates))

    def _judge(self, prepared: Prepared, lifted: Lifted, traced: Traced) -> Judged:
        """Check that the lifted model equals the user's and keeps rows independent, and decide whether it streams."""
        single, double = lifted.model.single, lifted.model.double
        draft = self._draft(lifted, traced.samples)
        reference, _, _ = traced.runners.subjects(traced.samples, draft)
        samples = probes.with_reached(reference)
        reference, _, served = traced.runners.subjects(samples, draft)
        check_same_as_original(prepared.exact, double, reference, prepared.attributes)
        long = LongSequences(prepared.exact, double, reference, prepared.is_changed, self._progress)
        long.check_answers(served, lifted.far)
        probes.check_rows(reference)
        reason = lifted.not_streamable_because or probes.why_not_streamable(
            replace(reference, run=torch_runner(double, double=True, ops=True)), double
        )
        if reason is None:
            counted = not single.row_by_row and any(place and place.counted for place in lifted.history)
            reason = probes.why_not_over_long(served, counted)
        if prepared.attributes:
            if reason is not None:
                raise refusal(prepared.attributes)
            check_continues(prepared.exact, double, reference, prepared.attributes)
        return Judged(replace(draft, streamable=reason is None, not_streamable_because=reason), samples)

    def _prove(self, traced: Traced, judged: Judged) -> Candidate:
        reference, single, served = traced.runners.subjects(judged.samples, judged.manifest)
        golden = parity.make_golden(reference)
        proven = parity.prove(golden, reference, single, served, traced.suspects)
        manifest = probes.with_batching(served, replace(judged.manifest, parity=proven, ragged=True))
        return Candidate(traced.content, golden, manifest)

    def _reduce(self, candidate: Candidate, lifted: Lifted, traced: Traced, judged: Judged) -> Candidate:
        """Convert to the requested precision, and apply the allowed error."""
        precision = self._options.precision
        if precision != "float32":
            self._progress(f"reducing it to {precision} and measuring the error")
            reference, _, _ = traced.runners.subjects(judged.samples, candidate.manifest)
            candidate = reduce(traced.graph, precision, candidate, lifted.model.single, reference)
        return replace(candidate, manifest=limit(candidate.manifest, self._options.max_error))

    def _write(self, candidate: Candidate, prepared: Prepared, lifted: Lifted, judged: Judged) -> Report:
        signer = self._options.signer
        try:
            path = bundle.write(
                self._options.repository,
                candidate.manifest,
                candidate.content,
                candidate.golden,
                replace_existing=self._options.replace,
                sign=None if signer is None else signer.sign,
            )
            manifest = bundle.read(path).manifest
        except BundleError as error:
            raise ExportError("bundle", error.message) from error
        except OSError as error:
            raise ExportError("bundle", str(error)) from error
        notes = notes_on(
            replace(lifted.model, samples=judged.samples),
            lifted.observation.dropped_outputs,
            prepared.attributes,
            prepared.dtype,
        )
        return Report(path, manifest, notes)
