"""Checks a bundle against its manifest independently of export: onnxruntime against the module in float64.

Sizes, inputs and chunkings are random. Every claim of the manifest is tested: streaming, padded rows, and bits that do
not depend on chunking or on other rows of the batch.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from unroll import bundle

Arrays = dict[str, np.ndarray]

#: `answer(inputs, double)`: the user's own module, whole sequences from its own initial state, by the bundle's names.
Answer = Callable[[Arrays, bool], Arrays]

#: `draw(batch, time, rng)`: inputs, each (batch, time, ...), and static ones, (batch, ...).
DrawInputs = Callable[[int, int, np.random.Generator], Arrays]


class Wrong(Exception):
    """A bundle's answers differ from its model's."""


class NoAnswer(Exception):
    """The module itself does not accept such a sequence."""


class WrongBits(Wrong):
    """A bundle is correct, but its bits depend on chunking or other rows, although its manifest denies it."""


#: Time steps of the longest sequence: a Python loop may change its behaviour after thousands.
LONGEST = 5100


@dataclass(frozen=True)
class Finding:
    """The largest absolute error against float64, and whether all bits agreed (None if the model does not stream)."""

    error: float
    bits: bool | None


def examine(path: Path, answer: Answer, draw: DrawInputs, *, seed: int = 0, rounds: int = 4) -> Finding:
    """Check a bundle. Raises Wrong."""
    found = bundle.read(path)
    graph = Graph(found)
    rng = np.random.default_rng(seed)
    findings = []
    for size in range(rounds):
        # At least 6 steps, because a model that cannot stream may need them.
        batch, time = int(rng.integers(1, 6)), int(rng.integers(6, 40)) if size else 6
        findings.append(_round(graph, answer, draw(batch, time, rng), rng))
    for time in (int(rng.integers(40, 400)), LONGEST):
        with suppress(NoAnswer):
            findings.append(_long_round(graph, answer, draw(1, time, rng), rng))
    bits = all(finding.bits for finding in findings) if found.manifest.streamable else None
    if found.manifest.bit_exact and bits is False:
        raise WrongBits("the manifest says bit_exact, and chunks differ from the whole in some bit")
    return Finding(max(finding.error for finding in findings), bits)


def steps(series: Arrays) -> int:
    return next(iter(series.values())).shape[1]


class Graph:
    """Runs a bundle on onnxruntime with one thread, from any state rows."""

    def __init__(self, found: bundle.Bundle) -> None:
        self.manifest = found.manifest
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(
            found.model,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=bundle.CRASHING_OPTIMIZERS,
        )
        self.names = [spec.name for spec in self.manifest.outputs]

    def run(self, inputs: Arrays, state: np.ndarray, lens: np.ndarray | None = None) -> tuple[Arrays, np.ndarray]:
        series = self.series(inputs)
        lens = np.full(len(state), steps(series), np.int32) if lens is None else lens
        feeds = series | {"state": state, "sequence_lens": lens}
        *outputs, after = self.session.run([*self.names, "state_out"], feeds)
        return dict(zip(self.names, outputs, strict=True)), after

    def series(self, inputs: Arrays) -> Arrays:
        """The inputs without the static ones."""
        return {spec.name: inputs[spec.name] for spec in self.manifest.inputs}

    def start(self, inputs: Arrays) -> np.ndarray:
        """The initial rows of the sequences, with their static inputs."""
        static = [spec.name for spec in self.manifest.static]
        batch = len(next(iter(inputs.values())))
        return np.stack(
            [self.manifest.initial_row({name: inputs[name][row] for name in static}) for row in range(batch)]
        )

    def cut(self, inputs: Arrays, chunks: list[int], company: Arrays, rng: np.random.Generator) -> Arrays:
        """Run each row in chunks, batching each chunk with rows of `company` in random order."""
        batch = len(next(iter(inputs.values())))
        state, start, pieces = self.start(inputs), 0, []
        for length in chunks:
            extra = int(rng.integers(0, 3))
            order = rng.permutation(batch + extra)
            feeds = {
                name: np.concatenate([array[:, start : start + length], company[name][:extra, :length]])[order]
                for name, array in self.series(inputs).items()
            }
            rows = np.concatenate([state, rng.uniform(-1, 1, (extra, state.shape[1])).astype(np.float32)])[order]
            outputs, after = self.run(feeds, rows)
            back = np.argsort(order)[:batch]
            pieces.append({name: array[back] for name, array in outputs.items()})
            state, start = after[back], start + length
        return {
            spec.name: np.concatenate([piece[spec.name] for piece in pieces], 1) if spec.time else pieces[-1][spec.name]
            for spec in self.manifest.outputs
        } | {"state_out": state}


def _round(graph: Graph, answer: Answer, inputs: Arrays, rng: np.random.Generator) -> Finding:
    manifest = graph.manifest
    batch, time = len(next(iter(inputs.values()))), steps(graph.series(inputs))
    expected, single = answer(inputs, True), answer(inputs, False)
    whole, after = graph.run(inputs, graph.start(inputs))
    size = f"{batch} sequences of {time} steps"
    worst, bits = _compare(whole, expected, single, size), None
    if manifest.streamable:
        chunks = _chunks(time, rng)
        company = {name: array[rng.integers(0, batch, 2)] for name, array in inputs.items()}
        cut = graph.cut(inputs, chunks, company, rng)
        worst = max(worst, _compare(cut, expected, single, f"{size} in chunks {chunks}"))
        bits = all(np.array_equal(cut[name], array) for name, array in (whole | {"state_out": after}).items())
    if manifest.ragged:
        worst = max(worst, _padded(graph, answer, inputs, rng))
    return Finding(worst, bits)


def _long_round(graph: Graph, answer: Answer, inputs: Arrays, rng: np.random.Generator) -> Finding:
    """Check one long sequence, whole and in a few chunks. Raises NoAnswer."""
    time = steps(graph.series(inputs))
    try:
        expected, single = answer(inputs, True), answer(inputs, False)
    except (IndexError, RuntimeError) as error:
        raise NoAnswer(f"a sequence of {time} steps: {error}") from error
    if not all(np.isfinite(array).all() for array in expected.values()):
        raise NoAnswer(f"a sequence of {time} steps: the module itself diverges")
    found, _ = graph.run(inputs, graph.start(inputs))
    worst = _compare(found, expected, single, f"a sequence of {time} steps")
    if graph.manifest.streamable:
        chunks = np.diff([0, *sorted(rng.choice(time - 1, 9, replace=False) + 1), time]).tolist()
        cut = graph.cut(inputs, chunks, {name: array[[0, 0]] for name, array in inputs.items()}, rng)
        worst = max(worst, _compare(cut, expected, single, f"a sequence of {time} steps in chunks {chunks}"))
    return Finding(worst, True)


def _padded(graph: Graph, answer: Answer, inputs: Arrays, rng: np.random.Generator) -> float:
    """Run rows of different lengths in one padded call, and compare each with the module on that row alone."""
    batch, time = len(next(iter(inputs.values()))), steps(graph.series(inputs))
    lens = rng.integers(4, time + 1, batch).astype(np.int32)
    outputs, _ = graph.run(inputs, graph.start(inputs), lens)
    worst = 0.0
    for row, length in enumerate(lens):
        alone = {name: array[row : row + 1] for name, array in inputs.items()}
        alone |= {name: array[:, :length] for name, array in graph.series(alone).items()}
        found = {
            spec.name: outputs[spec.name][row : row + 1, :length] if spec.time else outputs[spec.name][row : row + 1]
            for spec in graph.manifest.outputs
        }
        what = f"a row of {length} steps padded to {time}"
        worst = max(worst, _compare(found, answer(alone, True), answer(alone, False), what))
    return worst


def _compare(found: Arrays, expected: Arrays, single: Arrays, what: str) -> float:
    """Allow 20 times PyTorch's own float32 error, plus 2e-5 of the scale; returns the largest error. Raises Wrong."""
    worst = 0.0
    for name, truth in expected.items():
        if name not in found or found[name].shape != truth.shape:
            raise Wrong(f"{name} of {what} is {found.get(name, np.empty(0)).shape}, and should be {truth.shape}")
        if truth.dtype.kind != "f":
            continue  # a choice between nearly equal values may differ
        difference = _largest(found[name] - truth)
        allowed = 20 * _largest(single[name] - truth) + 2e-5 * max(1.0, _largest(truth))
        if not difference <= allowed:
            raise Wrong(f"{name} of {what} is off by {difference:.3g} (allowed {allowed:.3g})")
        worst = max(worst, difference)
    return worst


def _largest(array: np.ndarray) -> float:
    return float(np.max(np.abs(array)))


def _chunks(time: int, rng: np.random.Generator) -> list[int]:
    if rng.random() < 0.25:
        return [1] * time
    cuts = np.flatnonzero(rng.random(time - 1) < 0.3) + 1
    return np.diff([0, *cuts, time]).tolist()
