"""Golden vectors: inputs with PyTorch's float64 answers, replayed on whatever will serve the model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from unroll.bundle.manifest import Manifest

Arrays = dict[str, np.ndarray]

#: `run(inputs, state, sequence_lens) -> outputs, state_out`: one call of the bundle's graph.
RunFunction = Callable[[Arrays, np.ndarray, np.ndarray], tuple[Arrays, np.ndarray]]


class GoldenMismatch(Exception):
    """A model does not give PyTorch's answers on this provider."""


@dataclass(frozen=True, slots=True)
class Golden:
    """One batch of sequences and what PyTorch answers in float64.

    inputs: each (batch, time, ...); state: (batch, state_size) float32, row 0 being the model's initial
    state; outputs: each (batch, time, ...) or (batch, ...), float64 unless integer; state_out:
    (batch, state_size) float64; chunkings: ways to cut `time`, each summing to it.
    """

    inputs: Arrays
    state: np.ndarray
    outputs: Arrays
    state_out: np.ndarray
    chunkings: tuple[tuple[int, ...], ...]

    def to_bytes(self) -> bytes:
        tensors = {f"input.{name}": array for name, array in self.inputs.items()}
        tensors |= {f"output.{name}": array for name, array in self.outputs.items()}
        tensors |= {f"chunking.{i}": np.array(chunks) for i, chunks in enumerate(self.chunkings)}
        tensors |= {"state": self.state, "state_out": self.state_out}
        return save({name: np.ascontiguousarray(array) for name, array in tensors.items()})

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises ValueError on a damaged or incomplete file."""
        try:
            tensors = load(content)
            count = sum(name.startswith("chunking.") for name in tensors)
            return cls(
                inputs={n.removeprefix("input."): a for n, a in tensors.items() if n.startswith("input.")},
                state=tensors["state"],
                outputs={n.removeprefix("output."): a for n, a in tensors.items() if n.startswith("output.")},
                state_out=tensors["state_out"],
                chunkings=tuple(tuple(tensors[f"chunking.{i}"].tolist()) for i in range(count)),
            )
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"golden vectors cannot be read: {error}") from error


def replay(golden: Golden, manifest: Manifest, run: RunFunction, slack: float = 1.0) -> dict[str, float]:
    """Run every chunking (only the whole sequence if the model is not streamable).

    Returns the largest absolute difference from PyTorch float64, by output name and `state_out`.
    Raises GoldenMismatch when one exceeds `slack` times the manifest's tolerance or is not finite.
    """
    worst: dict[str, float] = {}
    length = next(iter(golden.inputs.values())).shape[1]
    chunkings = golden.chunkings if manifest.streamable else ((length,),)
    for chunks in chunkings:
        found = run_chunked(golden.inputs, golden.state, chunks, manifest, run)
        for name, difference in differences(golden, manifest, found, f"in chunks {chunks}", slack).items():
            worst[name] = max(worst.get(name, 0.0), difference)
    return worst


def differences(golden: Golden, manifest: Manifest, found: Arrays, how: str, slack: float = 1.0) -> dict[str, float]:
    """Largest absolute difference of outputs and `state_out`, by name, from PyTorch float64.

    how: for the message. Raises GoldenMismatch as `replay` does.
    """
    worst = {}
    for entry in manifest.parity:
        name, tolerance = entry.output, entry.tolerance * slack
        expected = golden.state_out if name == "state_out" else golden.outputs[name]
        worst[name] = float(np.max(np.abs(found[name].astype(np.float64) - expected)))
        if not worst[name] <= tolerance:
            raise GoldenMismatch(f"{name} differs from PyTorch by {worst[name]:.3g} (tolerance {tolerance:.3g}) {how}")
    return worst


def run_chunked(
    inputs: Arrays, state: np.ndarray, chunks: tuple[int, ...], manifest: Manifest, run: RunFunction
) -> Arrays:
    """Outputs of the whole sequence, by name, and `state_out`, computed chunk by chunk."""
    pieces: list[Arrays] = []
    start = 0
    for length in chunks:
        lens = np.full(len(state), length, np.int32)
        outputs, state = run({n: a[:, start : start + length] for n, a in inputs.items()}, state, lens)
        pieces.append(outputs)
        start += length
    joined = {
        spec.name: np.concatenate([piece[spec.name] for piece in pieces], axis=1)
        if spec.time
        else pieces[-1][spec.name]
        for spec in manifest.outputs
    }
    return joined | {"state_out": state}
