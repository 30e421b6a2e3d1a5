"""`unroll verify BUNDLE`: runs a bundle on a device, and compares the results with PyTorch's and with each other.

It does not need torch, because the golden vectors contain PyTorch's outputs in float64. It also checks that chunking,
batching and padding change nothing, with inputs drawn from the golden vectors.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unroll import bundle as bundles
from unroll.bundle import Bundle, BundleError, Golden, GoldenMismatch, Manifest, Verifier
from unroll.bundle.golden import Arrays
from unroll.bundle.inspect import table
from unroll.bundle.verification import Differences, differences, largest, random_chunks, select_rows
from unroll.service.core.choices import Precision
from unroll.service.engine.backend import DeviceBackend, EngineOptions, InsufficientMemory, open_backend
from unroll.service.engine.engine import DeviceFailed
from unroll.service.engine.runner import DeviceUnavailable, resolve_devices
from unroll.service.models.trial import Trials
from unroll.service.models.trial_process import TrialLimits
from unroll.service.state.slots import FIRST

#: Number of random trials per check, and rows of the largest batch.
_ROUNDS, _ROWS = 8, 17


class CannotVerify(Exception):
    """A bundle cannot be verified; the message says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report.

    Attributes:
        output: The output, or `state_out`.
        difference: The largest absolute difference over all values; NaN if an answer was not finite.
        allowed: The largest difference that passes.
    """

    what: str
    output: str
    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed


def report(
    path: Path, devices: str, precision: Precision, seed: int, limits: TrialLimits
) -> tuple[Bundle, dict[str, list[Check]]]:
    """Check a bundle on each device, after a trial in another process.

    Raises:
        CannotVerify: The bundle cannot be read, or cannot run there.
    """
    trials = Trials(limits)
    try:
        content = bundles.read_content(path.resolve())
        trials.prove(content)
        found = bundles.parse(content, limits.allowed_operators)
        engine = EngineOptions(precision=precision)
        return found, {device: list(verify(found, device, engine, seed)) for device in resolve_devices(devices)[0]}
    except BundleError as error:
        raise CannotVerify(f"{path}: {error}") from error
    except (DeviceFailed, DeviceUnavailable, GoldenMismatch, InsufficientMemory, ValueError) as error:
        raise CannotVerify(str(error)) from error
    finally:
        trials.close()


def verify(bundle: Bundle, device: str, options: EngineOptions, seed: int = 0) -> Iterator[Check]:
    """Check a bundle on `cpu` or `cuda:N`.

    Raises:
        DeviceUnavailable, DeviceFailed: The device cannot be used.
        InsufficientMemory, ValueError: The model cannot be loaded there.
    """
    backend = open_backend(bundle, device, options)
    golden, manifest = bundle.golden, bundle.manifest
    verifier = Verifier(backend.runner, manifest)
    rng = np.random.default_rng(seed)

    def largest_of(trial: Callable[[Verifier, Golden, np.random.Generator], Differences]) -> Differences:
        return largest([trial(verifier, golden, rng) for _ in range(_ROUNDS)])

    replayed = largest(differences(found, golden.expected) for _, found in verifier.replayed(golden))
    yield from _golden("golden vectors = PyTorch float64", replayed, manifest, backend)
    if manifest.streamable:
        yield from _same("random chunks = whole", largest_of(_cut), manifest, backend)
    yield from _same("in a batch = alone", largest_of(_batched), manifest, backend)
    if manifest.ragged:
        yield from _same("padded = alone", largest_of(_padded), manifest, backend)
    if manifest.streamable:
        yield from _stepped(manifest, backend)


def lines(device: str, checks: list[Check]) -> Iterator[str]:
    rows = [
        [c.what, c.output, f"{c.difference:.2e}", f"{c.allowed:.2e}", "ok" if c.holds else "DIFFERS"] for c in checks
    ]
    return table([device, "output", "difference", "allowed", ""], rows)


def _golden(what: str, measured: Differences, manifest: Manifest, backend: DeviceBackend) -> Iterator[Check]:
    for entry in manifest.parity:
        yield Check(what, entry.output, measured.get(entry.output, 0.0), entry.tolerance * backend.slack)


def _same(what: str, measured: Differences, manifest: Manifest, backend: DeviceBackend) -> Iterator[Check]:
    """Differences between two answers of the model: none if the manifest promises it, else twice the tolerance."""
    exact = manifest.bit_exact and backend.runner.provider == "CPUExecutionProvider"
    for entry in manifest.parity:
        yield Check(what, entry.output, measured[entry.output], 0.0 if exact else 2 * entry.tolerance * backend.slack)


def _stepped(manifest: Manifest, backend: DeviceBackend) -> Iterator[Check]:
    """Replay the golden vectors step by step in the server's engine. The device cannot be used afterwards."""
    try:
        engine, proof = backend.create_engine(FIRST + _ROWS, _ROWS)
    except GoldenMismatch as error:
        yield Check(f"stepped by the engine: {error}", "", float("nan"), 0.0)
        return
    engine.close()
    yield from _golden("golden vectors, stepped by the engine", proof.parity, manifest, backend)


def _cut(verifier: Verifier, golden: Golden, rng: np.random.Generator) -> Differences:
    inputs, state = _resample(golden, int(rng.integers(1, 4)), rng)
    chunks = random_chunks(golden.time, rng)
    whole = verifier.whole(inputs, state)
    return differences(verifier.chunked(inputs, state, chunks), whole)


def _batched(verifier: Verifier, golden: Golden, rng: np.random.Generator) -> Differences:
    inputs, state = _resample(golden, int(rng.integers(2, _ROWS + 1)), rng)
    row = int(rng.integers(len(state)))
    one = slice(row, row + 1)
    together = verifier.whole(inputs, state)
    return differences(verifier.whole(select_rows(inputs, one), state[one]), select_rows(together, one))


def _padded(verifier: Verifier, golden: Golden, rng: np.random.Generator) -> Differences:
    inputs, state = _resample(golden, 3, rng)
    time = golden.time
    lens = np.array([time, max(1, time // 2), max(1, time - 1)], np.int32)
    return largest(verifier.padded(inputs, state, lens))


def _resample(golden: Golden, batch: int, rng: np.random.Generator) -> tuple[Arrays, np.ndarray]:
    """Draw sequences from the golden time steps, and state rows from the golden ones."""
    rows, time = len(golden.state), golden.time
    which = rng.integers(0, rows, (batch, time)), rng.integers(0, time, (batch, time))
    return {name: array[which] for name, array in golden.inputs.items()}, golden.state[rng.integers(0, rows, batch)]
