"""Proves that onnxruntime's answers equal PyTorch's, and keeps the proof as golden vectors."""

from dataclasses import dataclass, replace

import numpy as np

from unroll.bundle import Golden, GoldenMismatch, Manifest, Parity, RunFunction, Verifier
from unroll.bundle.verification import Differences, difference, differences, random_chunks
from unroll.export.errors import ExportError
from unroll.export.signature.samples import Samples
from unroll.export.verification import trials
from unroll.export.verification.trials import Subject, Trial

_GOLDEN_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Runners:
    """The same model, run in three ways.

    Attributes:
        reference: PyTorch in float64.
        single: PyTorch in float32.
        served: the graph on onnxruntime.
    """

    reference: RunFunction
    single: RunFunction
    served: RunFunction

    def subjects(self, samples: Samples, manifest: Manifest) -> tuple[Subject, Subject, Subject]:
        """The three runners as subjects, in this order."""
        return (
            Subject(self.reference, manifest, samples),
            Subject(self.single, manifest, samples),
            Subject(self.served, manifest, samples),
        )


def make_golden(reference: Subject) -> Golden:
    """Make golden vectors with PyTorch in float64: at most 3 sequences of 24 steps, fewer for wide inputs.

    Raises:
        ExportError: parity, if a streaming model's answers depend on how a sequence is cut.
    """
    manifest = reference.manifest
    trial = next((each for each in trials.GOLDEN if _bytes(each, manifest) <= _GOLDEN_BYTES), trials.GOLDEN[-1])
    inputs, state = reference.inputs(trial), reference.rows(trial)
    answers = reference.whole(inputs, state)
    rng = np.random.default_rng(73)
    time = trial.time
    chunkings = ((time,), (1,) * time, random_chunks(time, rng), random_chunks(time, rng))
    golden = Golden(inputs, state, answers, answers.pop("state_out"), chunkings)
    if manifest.streamable:
        _check_cuts(golden, reference)
    return golden


def _bytes(trial: Trial, manifest: Manifest) -> int:
    """The size of golden vectors: inputs and state as they are, outputs and final state in float64."""
    step = sum(4 * spec.size for spec in manifest.inputs) + sum(8 * spec.size for spec in manifest.outputs)
    return trial.batch * (trial.time * step + 12 * manifest.state_size)


def _check_cuts(golden: Golden, reference: Subject) -> None:
    """A cut must make no difference in float64, where it cannot be mistaken for rounding."""
    for chunks in golden.chunkings[1:]:  # the first is the whole
        found = reference.chunked(golden.inputs, golden.state.astype(np.float64), chunks)
        for name, expected in golden.expected.items():
            if not difference(found[name], expected) <= 1e-6 * max(1.0, float(np.max(np.abs(expected)))):
                raise ExportError("parity", f"{name} depends on how a sequence is cut, which a longer search has shown")


def prove(
    golden: Golden, reference: Subject, single: Subject, served: Subject, suspects: list[tuple[int, int]]
) -> tuple[Parity, ...]:
    """Measure onnxruntime and PyTorch in float32 against PyTorch in float64.

    The tolerance is 4 times PyTorch's own float32 error plus 1e-7 of the output's scale.

    Args:
        reference, single, served: the model in PyTorch in both precisions, and on onnxruntime.
        suspects: sizes (batch, time) to try in addition to the golden vectors.

    Raises:
        ExportError: parity, if onnxruntime exceeds the tolerance.
    """
    expected = golden.expected
    own = _own_error(golden, reference, single)
    tolerance = {name: _tolerance(own[name], array) for name, array in expected.items()}
    draft = tuple(Parity(name, 0.0, own[name], tolerance[name]) for name in expected)
    try:
        worst = Verifier(served.run, replace(served.manifest, parity=draft)).replay(golden)
    except GoldenMismatch as error:
        raise ExportError("parity", f"onnxruntime and PyTorch disagree: {error}") from None
    for batch, time in (*trials.SIZES, *suspects):
        trial = Trial(batch, time, trials.SIZES_INPUT_SEED, trials.SIZES_ROW_SEED)
        _check_size(trial, reference, single, served, tolerance)
    return tuple(Parity(name, worst[name], own[name], tolerance[name]) for name in expected)


def _own_error(golden: Golden, reference: Subject, single: Subject) -> Differences:
    """The largest float32 error of PyTorch by output, over the golden inputs and further sequences."""
    trial = Trial(trials.OWN_ERROR_BATCH, golden.time, trials.OWN_ERROR_INPUT_SEED, trials.OWN_ERROR_ROW_SEED)
    inputs, state = reference.inputs(trial), reference.rows(trial)
    answers = reference.whole(inputs, state)
    own = differences(single.whole(inputs, state), answers)
    for _, found in single.replayed(golden):
        for name, value in differences(found, golden.expected).items():
            own[name] = max(own[name], value)
    return own


def _check_size(
    trial: Trial, reference: Subject, single: Subject, served: Subject, tolerance: dict[str, float]
) -> None:
    inputs, state = reference.inputs(trial), reference.rows(trial)
    try:
        answers = reference.whole(inputs, state)
    except ExportError:
        if reference.manifest.streamable:
            raise
        return  # the model needs more time steps
    own, found = single.whole(inputs, state), served.whole(inputs, state)
    for spec in reference.manifest.outputs:
        if found[spec.name].dtype != spec.numpy:
            raise ExportError(
                "parity", f"{spec.name} is {spec.dtype} in PyTorch, {found[spec.name].dtype} in the graph"
            )
    for name, array in found.items():
        allowed = max(tolerance[name], _tolerance(difference(own[name], answers[name]), answers[name]))
        measured = difference(array, answers[name])
        if not measured <= allowed:
            raise ExportError(
                "parity",
                f"onnxruntime and PyTorch disagree for a batch of {trial.batch} with {trial.time} time steps: {name} "
                f"differs by {measured:.3g} (tolerance {allowed:.3g})",
            )


def _tolerance(own: float, expected: np.ndarray) -> float:
    scale = max(1.0, float(np.max(np.abs(expected.astype(np.float64)))))
    return 4 * own + 1e-7 * scale
