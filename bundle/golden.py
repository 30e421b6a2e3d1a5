"""Golden vectors: inputs with PyTorch's float64 outputs, with which `verification.py` compares a model's outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from unroll.bundle.errors import BundleError
from unroll.bundle.manifest import Manifest

Arrays = dict[str, np.ndarray]

#: `run(inputs, state, sequence_lens) -> outputs, state_out`: one call of the bundle's graph.
RunFunction = Callable[[Arrays, np.ndarray, np.ndarray], tuple[Arrays, np.ndarray]]


#: Maximum number of calls per replay. Export writes four chunkings of at most 24 time steps.
_MOST_CHUNKS = 4096
#: Maximum tolerance as a share of an output's largest value, in general and for integers, and a minimum for outputs
#: near zero. Export wrote at most 0.012, and 1.4 for integer graphs or outputs.
_SHARE, _SHARE_OF_INTEGERS, _LEAST_TOLERANCE = 0.1, 4.0, 1e-5


@dataclass(frozen=True, slots=True)
class Golden:
    """One batch of sequences and PyTorch's outputs in float64.

    Attributes:
        inputs: By name, each (batch, time, *shape).
        state: The state rows before the sequences, (batch, state_size) float32. Row 0 is the model's initial state.
        outputs: By name, each (batch, time, *shape) or (batch, *shape) without time; float64 unless integer.
        state_out: The state rows after the sequences, (batch, state_size) float64.
        chunkings: Ways to cut the time steps into chunks.
    """

    inputs: Arrays
    state: np.ndarray
    outputs: Arrays
    state_out: np.ndarray
    chunkings: tuple[tuple[int, ...], ...]

    @property
    def time(self) -> int:
        """Time steps of the sequences."""
        return int(next(iter(self.inputs.values())).shape[1])

    @property
    def expected(self) -> Arrays:
        """The outputs and `state_out`, by name."""
        return self.outputs | {"state_out": self.state_out}

    def first(self, count: int) -> Self:
        return type(self)(
            {name: array[:count] for name, array in self.inputs.items()},
            self.state[:count],
            {name: array[:count] for name, array in self.outputs.items()},
            self.state_out[:count],
            self.chunkings,
        )

    def to_bytes(self) -> bytes:
        """Return the content of `golden.safetensors`."""
        tensors = self._tensors() | {f"chunking.{i}": np.array(chunks) for i, chunks in enumerate(self.chunkings)}
        return save({name: np.ascontiguousarray(array) for name, array in tensors.items()})

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Read the content of `golden.safetensors`.

        Raises:
            ValueError: It is damaged or incomplete.
        """
        try:
            tensors = load(content)
            count = sum(name.startswith("chunking.") for name in tensors)
            if sum(tensors[f"chunking.{i}"].size for i in range(count)) > _MOST_CHUNKS:
                raise BundleError(
                    "bundle_too_large", f"its golden vectors are cut into more than {_MOST_CHUNKS} chunks"
                )
            return cls(
                inputs={n.removeprefix("input."): a for n, a in tensors.items() if n.startswith("input.")},
                state=tensors["state"],
                outputs={n.removeprefix("output."): a for n, a in tensors.items() if n.startswith("output.")},
                state_out=tensors["state_out"],
                chunkings=tuple(_chunks(tensors[f"chunking.{i}"]) for i in range(count)),
            )
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"the golden vectors in golden.safetensors cannot be read: {error}") from error

    def check(self, manifest: Manifest) -> None:
        """Check that the vectors match the manifest.

        Raises:
            ValueError: A tensor is missing, unknown, of the wrong shape or type, or not finite; or a chunking does not
                add up to the time steps.
        """
        batch, time, *_ = (*next(iter(self.inputs.values()), np.empty(0)).shape, 0, 0)
        row = (batch, manifest.state_size)
        wanted = {f"input.{spec.name}": (spec.numpy, (batch, time, *spec.shape)) for spec in manifest.inputs}
        for spec in manifest.outputs:
            dtype = np.dtype(np.float64) if spec.numpy.kind == "f" else spec.numpy
            wanted[f"output.{spec.name}"] = dtype, (batch, time, *spec.shape) if spec.time else (batch, *spec.shape)
        wanted |= {"state": (np.dtype(np.float32), row), "state_out": (np.dtype(np.float64), row)}
        found = {name: (array.dtype, array.shape) for name, array in self._tensors().items()}
        if wrong := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
            name = wrong[0]
            raise ValueError(f"golden.safetensors: {name} is {_text(found.get(name))}, not {_text(wanted.get(name))}")
        missing = {f"input.{spec.name}" for spec in manifest.inputs if spec.nan}
        for name, array in self._tensors().items():
            if not (np.isfinite(array) | (np.isnan(array) & (name in missing))).all():
                raise ValueError(f"golden.safetensors: {name} holds a value that is not finite")
        if not batch or not time or (manifest.streamable and not self.chunkings):
            raise ValueError("golden.safetensors holds no sequence, or no way to cut it into chunks")
        self._check_tolerances(manifest)
        for chunks in self.chunkings:
            if min(chunks, default=0) < 1 or sum(chunks) != time:
                raise ValueError(f"golden.safetensors: the chunks {chunks} do not add up to {time} time steps")

    def _check_tolerances(self, manifest: Manifest) -> None:
        """Check that no tolerance is so large that any answer would pass."""
        for entry in manifest.parity:
            expected = self.expected[entry.output]
            exact = manifest.precision == "float32" and expected.dtype.kind == "f"
            largest = (_SHARE if exact else _SHARE_OF_INTEGERS) * float(np.max(np.abs(expected.astype(np.float64))))
            if entry.tolerance > largest + _LEAST_TOLERANCE:
                raise BundleError(
                    "bundle_tolerance",
                    f"{entry.output} may differ from PyTorch by {entry.tolerance:.3g}, and "
                    f"{largest + _LEAST_TOLERANCE:.3g} is the most that its values allow",
                )

    def _tensors(self) -> Arrays:
        tensors = {f"input.{name}": array for name, array in self.inputs.items()}
        tensors |= {f"output.{name}": array for name, array in self.outputs.items()}
        return tensors | {"state": self.state, "state_out": self.state_out}


def _chunks(array: np.ndarray) -> tuple[int, ...]:
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"golden.safetensors: a chunking is {_text((array.dtype, array.shape))}, not a row of integers"
        )
    return tuple(array.tolist())


def _text(tensor: tuple[np.dtype, tuple[int, ...]] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} of shape {tensor[1]}"
