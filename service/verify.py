"""`unroll verify BUNDLE`: runs a bundle on a device of this machine and compares it with PyTorch's answers and itself.

Needs no torch: the golden vectors hold PyTorch's answers in float64. Everything else that may not make a difference is
tried with other inputs, cut from the golden ones: how a sequence is cut, what else is in the batch, padding.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from unroll import bundle as bundles
from unroll.bundle import Bundle, BundleError, GoldenMismatch
from unroll.bundle.golden import Arrays, run_chunked
from unroll.service.engine.backend import DeviceBackend, EngineOptions, InsufficientMemory, Precision, open_backend
from unroll.service.engine.engine import DeviceFailed
from unroll.service.engine.runner import DeviceUnavailable, resolve_devices
from unroll.service.state.slots import FIRST

#: Sequences that are cut at random, and rows of the largest batch.
_ROUNDS, _ROWS = 8, 17


@dataclass(frozen=True, slots=True)
class Check:
    """difference: the largest, absolute, over all values of `output`; NaN if there was no finite answer."""

    what: str
    output: str
    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed


def main(argv: list[str]) -> int:
    """0 if every check holds on every device, 1 if one does not or could not be made."""
    options = _parser().parse_args(argv)
    try:
        found = bundles.read(options.bundle.resolve())
        devices, _ = resolve_devices(options.device)
        engine = EngineOptions(precision=options.precision)
        results = {device: list(verify(found, device, engine, options.seed)) for device in devices}
    except (BundleError, DeviceFailed, DeviceUnavailable, GoldenMismatch, InsufficientMemory, ValueError) as error:
        print(f"unroll verify: {error}", file=sys.stderr)
        return 1
    print(f"{found.manifest.name} version {found.manifest.version}: {found.path}")
    for device, checks in results.items():
        print("", *lines(device, checks), sep="\n")
    return 0 if all(check.holds for checks in results.values() for check in checks) else 1


def verify(bundle: Bundle, device: str, options: EngineOptions, seed: int = 0) -> Iterator[Check]:
    """Check a bundle on `cpu` or `cuda:N`.

    Raises:
        DeviceUnavailable, DeviceFailed: The device cannot be used.
        InsufficientMemory, ValueError: The model cannot be loaded there.
    """
    backend = open_backend(bundle, device, options)
    rng = np.random.default_rng(seed)
    yield from _golden(bundle, backend)
    if bundle.manifest.streamable:
        yield from _worst(
            "random chunks = whole", [_cut(bundle, backend, rng) for _ in range(_ROUNDS)], bundle, backend
        )
    yield from _worst("in a batch = alone", [_company(bundle, backend, rng) for _ in range(_ROUNDS)], bundle, backend)
    if bundle.manifest.ragged:
        padded = [_padded(bundle, backend, rng) for _ in range(_ROUNDS)]
        yield from _worst("padded = alone", padded, bundle, backend)
    if bundle.manifest.streamable:
        yield from _sessions(bundle, backend)


def lines(device: str, checks: list[Check]) -> Iterator[str]:
    head = (device, "output", "difference", "allowed", "")
    rows = [
        (c.what, c.output, f"{c.difference:.2e}", f"{c.allowed:.2e}", "ok" if c.holds else "DIFFERS") for c in checks
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _golden(bundle: Bundle, backend: DeviceBackend) -> Iterator[Check]:
    golden, manifest = bundle.golden, bundle.manifest
    time = next(iter(golden.inputs.values())).shape[1]
    expected = golden.outputs | {"state_out": golden.state_out}
    found = [
        _differences(run_chunked(golden.inputs, golden.state, chunks, manifest, backend.runner), expected)
        for chunks in (golden.chunkings if manifest.streamable else ((time,),))
    ]
    for entry in manifest.parity:
        worst = np.max([differences[entry.output] for differences in found])
        yield Check("golden vectors = PyTorch float64", entry.output, float(worst), entry.tolerance * backend.slack)


def _sessions(bundle: Bundle, backend: DeviceBackend) -> Iterator[Check]:
    """The golden vectors once more, step by step through the server's engine. It is the device's last use."""
    try:
        engine, proof = backend.create_engine(FIRST + _ROWS, _ROWS)
    except GoldenMismatch as error:
        yield Check(f"stepped by the engine: {error}", "", float("nan"), 0.0)
        return
    engine.close()
    for entry in bundle.manifest.parity:
        difference = proof.parity.get(entry.output, 0.0)
        yield Check("golden vectors, stepped by the engine", entry.output, difference, entry.tolerance * backend.slack)


def _worst(what: str, rounds: list[Arrays], bundle: Bundle, backend: DeviceBackend) -> Iterator[Check]:
    """Not a bit may differ where the manifest says so; elsewhere two answers may each be off by the tolerance."""
    exact = bundle.manifest.bit_exact and backend.runner.provider == "CPUExecutionProvider"
    for entry in bundle.manifest.parity:
        worst = float(np.max([each[entry.output] for each in rounds]))  # NaN, if there is one
        yield Check(what, entry.output, worst, 0.0 if exact else 2 * entry.tolerance * backend.slack)


def _cut(bundle: Bundle, backend: DeviceBackend, rng: np.random.Generator) -> Arrays:
    inputs, state = _draw(bundle, int(rng.integers(1, 4)), rng)
    time = next(iter(inputs.values())).shape[1]
    cuts = np.flatnonzero(rng.random(time - 1) < 0.4) + 1
    chunks = tuple(np.diff([0, *cuts, time]).tolist())
    whole = run_chunked(inputs, state, (time,), bundle.manifest, backend.runner)
    return _differences(run_chunked(inputs, state, chunks, bundle.manifest, backend.runner), whole)


def _company(bundle: Bundle, backend: DeviceBackend, rng: np.random.Generator) -> Arrays:
    inputs, state = _draw(bundle, int(rng.integers(2, _ROWS + 1)), rng)
    time, row = next(iter(inputs.values())).shape[1], int(rng.integers(len(state)))
    together = run_chunked(inputs, state, (time,), bundle.manifest, backend.runner)
    one = slice(row, row + 1)
    alone = {name: array[one] for name, array in inputs.items()}
    return _differences(
        run_chunked(alone, state[one], (time,), bundle.manifest, backend.runner),
        {name: array[one] for name, array in together.items()},
    )


def _padded(bundle: Bundle, backend: DeviceBackend, rng: np.random.Generator) -> Arrays:
    inputs, state = _draw(bundle, 3, rng)
    time = next(iter(inputs.values())).shape[1]
    lens = np.array([time, max(1, time // 2), max(1, time - 1)], np.int32)
    outputs, after = backend.runner(inputs, state, lens)
    worst: Arrays = {}
    for row, length in enumerate(lens):
        one = slice(row, row + 1)
        alone, reached = backend.runner(
            {name: array[one, :length] for name, array in inputs.items()}, state[one], lens[one]
        )
        padded = {
            spec.name: outputs[spec.name][one, :length] if spec.time else outputs[spec.name][one]
            for spec in bundle.manifest.outputs
        }
        for name, value in _differences(padded | {"state_out": after[one]}, alone | {"state_out": reached}).items():
            worst[name] = np.maximum(value, worst.get(name, 0.0))
    return worst


def _draw(bundle: Bundle, batch: int, rng: np.random.Generator) -> tuple[Arrays, np.ndarray]:
    """The time steps of the golden sequences in another order, and their states for other rows."""
    golden = bundle.golden
    rows, time = next(iter(golden.inputs.values())).shape[:2]
    which = rng.integers(0, rows, (batch, time)), rng.integers(0, time, (batch, time))
    return {name: array[which] for name, array in golden.inputs.items()}, golden.state[rng.integers(0, rows, batch)]


def _differences(found: Arrays, expected: Arrays) -> Arrays:
    return {name: np.max(np.abs(array.astype(np.float64) - expected[name])) for name, array in found.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("unroll verify", description="Run a bundle and compare it with PyTorch's answers.")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder REPOSITORY/NAME/VERSION")
    parser.add_argument(
        "--device",
        default=os.environ.get("UNROLL_DEVICE", "cpu"),
        help="cpu, cuda:N, several as in cuda:0,cuda:1, or auto: a GPU if any (%(default)s)",
    )
    parser.add_argument("--precision", choices=get_args(Precision), default="float32", help="on a GPU (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random cuts and batches (%(default)s)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
