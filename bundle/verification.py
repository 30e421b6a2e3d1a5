"""Checks that chunking, batching and padding do not change a model's answers. Needs only NumPy.

Export, the server at start, and `unroll verify` compare answers with these functions.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from unroll.bundle.golden import Arrays, Golden, RunFunction
from unroll.bundle.manifest import Manifest

#: Largest absolute difference, by output name and `state_out`.
Differences = dict[str, float]


class GoldenMismatch(Exception):
    """A model's answers on this device differ from PyTorch's by more than its tolerance."""


@dataclass(frozen=True, slots=True)
class Verifier:
    """Runs one model in ways that must not change its answers.

    An answer has the outputs by name, each (batch, time, *shape) or (batch, *shape) without time, and `state_out`,
    (batch, state_size).

    Attributes:
        run: One call of the model's graph.
        manifest: The model's tensors and tolerances.
    """

    run: RunFunction
    manifest: Manifest

    def whole(self, inputs: Arrays, state: np.ndarray) -> Arrays:
        """Run whole sequences in one call.

        Args:
            inputs: By name, each (batch, time, *shape).
            state: The state rows before them, (batch, state_size).
        """
        return self.chunked(inputs, state, (next(iter(inputs.values())).shape[1],))

    def chunked(self, inputs: Arrays, state: np.ndarray, chunks: Iterable[int]) -> Arrays:
        """Run sequences chunk by chunk, each from the state after the previous one.

        Args:
            inputs: As for `whole`.
            state: As for `whole`.
            chunks: Time steps of each call.
        """
        answers: list[Arrays] = []
        start = 0
        for length in chunks:
            lens = np.full(len(state), length, np.int32)
            outputs, state = self.run({n: a[:, start : start + length] for n, a in inputs.items()}, state, lens)
            answers.append(outputs)
            start += length
        return join_chunks(answers, self.manifest) | {"state_out": state}

    def padded(self, inputs: Arrays, state: np.ndarray, lens: np.ndarray) -> Iterator[Differences]:
        """Run sequences of different lengths as one padded batch; yield the differences from unpadded runs, by length.

        Args:
            inputs: As for `whole`; a row's values after its length are the padding.
            state: As for `whole`.
            lens: Time steps of each row, (batch,) int32; the longest is all of `inputs`.
        """
        outputs, after = self.run(inputs, state, lens)
        for length in np.unique(lens)[::-1]:
            rows = np.flatnonzero(lens == length)
            unpadded = {name: array[rows, :length] for name, array in inputs.items()}
            expected, expected_after = self.run(unpadded, state[rows], lens[rows])
            found = {
                spec.name: outputs[spec.name][rows, :length] if spec.time else outputs[spec.name][rows]
                for spec in self.manifest.outputs
            }
            yield differences(found | {"state_out": after[rows]}, expected | {"state_out": expected_after})

    def replayed(self, golden: Golden) -> Iterator[tuple[tuple[int, ...], Arrays]]:
        """Run the golden sequences in each of their chunkings, or only whole if the model cannot be streamed."""
        for chunks in golden.chunkings if self.manifest.streamable else ((golden.time,),):
            yield chunks, self.chunked(golden.inputs, golden.state, chunks)

    def replay(self, golden: Golden, slack: float = 1.0) -> Differences:
        """Run the golden sequences and return the largest differences from PyTorch in float64.

        Args:
            slack: Factor on the manifest's tolerance.

        Raises:
            GoldenMismatch: A difference exceeds the tolerance, or is not finite.
        """
        return largest(
            check_golden(found, golden, self.manifest, f"in chunks {chunks}", slack)
            for chunks, found in self.replayed(golden)
        )


def check_golden(found: Arrays, golden: Golden, manifest: Manifest, how: str, slack: float = 1.0) -> Differences:
    """Return the differences of answers from PyTorch in float64.

    Args:
        found: The answers to the golden sequences.
        manifest: The model's tolerances.
        how: How the sequences were run, for the message.
        slack: As for `Verifier.replay`.

    Raises:
        GoldenMismatch: As `Verifier.replay`.
    """
    measured = differences(found, golden.expected)
    for entry in manifest.parity:
        tolerance, worst = entry.tolerance * slack, measured[entry.output]
        if not worst <= tolerance:
            raise GoldenMismatch(
                f"{entry.output} differs from PyTorch by {worst:.3g} (tolerance {tolerance:.3g}) {how}"
            )
    return {entry.output: measured[entry.output] for entry in manifest.parity}


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference; infinity if the shapes differ, NaN if a value is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.max(np.abs(found.astype(np.float64) - expected.astype(np.float64))))


def differences(found: Arrays, expected: Arrays) -> Differences:
    """Return the largest absolute difference of each array in `found` from the array of that name in `expected`."""
    return {name: difference(array, expected[name]) for name, array in found.items()}


def largest(measured: Iterable[Differences]) -> Differences:
    """Return the largest difference per name; NaN if one is NaN."""
    worst: Differences = {}
    for each in measured:
        for name, value in each.items():
            worst[name] = float(np.maximum(value, worst.get(name, 0.0)))
    return worst


def join_chunks(answers: Sequence[Arrays], manifest: Manifest) -> Arrays:
    """Combine the outputs of chunks into those of whole sequences."""
    return {
        spec.name: np.concatenate([answer[spec.name] for answer in answers], axis=1)
        if spec.time
        else answers[-1][spec.name]
        for spec in manifest.outputs
    }


def select_rows(arrays: Arrays, rows: slice | np.ndarray) -> Arrays:
    """Return these rows of every array."""
    return {name: array[rows] for name, array in arrays.items()}


def random_chunks(time: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Cut `time` steps at random places, at least once if there are two."""
    cuts = np.flatnonzero(rng.random(time - 1) < 0.4) + 1
    if not len(cuts) and time > 1:
        cuts = np.array([time // 2])
    return tuple(int(size) for size in np.diff([0, *cuts, time]))
