"""Proves that onnxruntime gives PyTorch's answers, and keeps the proof as golden vectors."""

from dataclasses import replace

import numpy as np

from unroll.bundle import Golden, GoldenMismatch, Manifest, Parity, RunFunction, Verifier
from unroll.bundle.verification import difference, differences, random_chunks
from unroll.export.errors import ExportError
from unroll.export.signature.samples import Samples

_GOLDEN_BYTES = 64 * 1024


def make_golden(reference: RunFunction, samples: Samples, manifest: Manifest) -> Golden:
    """Golden vectors from `reference` (PyTorch in float64): at most 3 sequences of 24 steps, less if they are wide."""
    for batch, time in ((3, 24), (3, 16), (2, 16), (2, 12), (2, 8)):
        inputs, state = samples.draw(batch, time, seed=71), samples.rows(batch, manifest, seed=72)
        answers = Verifier(reference, manifest).whole(inputs, state)
        rng = np.random.default_rng(73)
        chunkings = ((time,), (1,) * time, random_chunks(time, rng), random_chunks(time, rng))
        golden = Golden(inputs, state, answers, answers.pop("state_out"), chunkings)
        if manifest.streamable:
            _check_cuts(golden, reference, manifest)
        if len(golden.to_bytes()) <= _GOLDEN_BYTES:
            break
    return golden


def _check_cuts(golden: Golden, reference: RunFunction, manifest: Manifest) -> None:
    """Not even in float64 may a cut make a difference: it would be taken for rounding. Raises ExportError(parity)."""
    for chunks in golden.chunkings:
        found = Verifier(reference, manifest).chunked(golden.inputs, golden.state.astype(np.float64), chunks)
        for name, expected in golden.expected.items():
            if not difference(found[name], expected) <= 1e-6 * max(1.0, float(np.max(np.abs(expected)))):
                raise ExportError("parity", f"{name} depends on how a sequence is cut, which a longer search has shown")


def prove(
    golden: Golden,
    reference: RunFunction,
    single: RunFunction,
    served: RunFunction,
    samples: Samples,
    manifest: Manifest,
    sizes: list[tuple[int, int]],
) -> tuple[Parity, ...]:
    """Measure `served` (onnxruntime) and `single` (PyTorch in float32) against `reference` (PyTorch in float64).

    Over the golden vectors, and at other `sizes` (batch, time) than those. The tolerance is 4 times PyTorch's own
    float32 error plus 1e-7 of the output's scale. Raises ExportError(parity).
    """
    expected = golden.expected
    own = _own_error(golden, reference, single, samples, manifest)
    tolerance = {name: _tolerance(own[name], array) for name, array in expected.items()}
    draft = tuple(Parity(name, 0.0, own[name], tolerance[name]) for name in expected)
    try:
        worst = Verifier(served, replace(manifest, parity=draft)).replay(golden)
    except GoldenMismatch as error:
        raise ExportError("parity", f"onnxruntime and PyTorch disagree: {error}") from None
    _prove_sizes(reference, single, served, samples, manifest, tolerance, [(1, 1), (5, 3), (1, 37), *sizes])
    return tuple(Parity(name, worst[name], own[name], tolerance[name]) for name in expected)


def _own_error(
    golden: Golden, reference: RunFunction, single: RunFunction, samples: Samples, manifest: Manifest
) -> dict[str, float]:
    """PyTorch float32's largest error, by output, over the golden inputs and 32 more sequences.

    More than the golden ones, since the largest of a few errors is often small by luck, and onnxruntime's is not.
    """
    inputs, state = samples.draw(32, golden.time, seed=77), samples.rows(32, manifest, seed=78)
    verifier = Verifier(single, manifest)
    own = differences(verifier.whole(inputs, state), Verifier(reference, manifest).whole(inputs, state))
    for _, found in verifier.replayed(golden):
        for name, value in differences(found, golden.expected).items():
            own[name] = max(own[name], value)
    return own


def _prove_sizes(
    reference: RunFunction,
    single: RunFunction,
    served: RunFunction,
    samples: Samples,
    manifest: Manifest,
    tolerance: dict[str, float],
    sizes: list[tuple[int, int]],
) -> None:
    """Nothing may be fixed to the batch and the length that were traced."""
    for batch, time in sizes:
        inputs, state = samples.draw(batch, time, seed=75), samples.rows(batch, manifest, seed=76)
        try:
            answers = Verifier(reference, manifest).whole(inputs, state)
        except ExportError:
            if manifest.streamable:
                raise
            continue  # it needs more steps than these
        own = Verifier(single, manifest).whole(inputs, state)
        found = Verifier(served, manifest).whole(inputs, state)
        for spec in manifest.outputs:
            if found[spec.name].dtype != spec.numpy:
                raise ExportError(
                    "parity", f"{spec.name} is {spec.dtype} in PyTorch, {found[spec.name].dtype} in the graph"
                )
        for name, array in found.items():
            allowed = max(tolerance[name], _tolerance(difference(own[name], answers[name]), answers[name]))
            off = difference(array, answers[name])
            if not off <= allowed:
                raise ExportError(
                    "parity",
                    f"onnxruntime and PyTorch disagree for a batch of {batch} with {time} time steps: {name} differs "
                    f"by {off:.3g} (tolerance {allowed:.3g})",
                )


def _tolerance(own: float, expected: np.ndarray) -> float:
    scale = max(1.0, float(np.max(np.abs(expected.astype(np.float64)))))
    return 4 * own + 1e-7 * scale
