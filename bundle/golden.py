"""Golden vectors: inputs with PyTorch's float64 answers. `verification.py` compares a model's answers with them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

Arrays = dict[str, np.ndarray]

#: `run(inputs, state, sequence_lens) -> outputs, state_out`: one call of the bundle's graph.
RunFunction = Callable[[Arrays, np.ndarray, np.ndarray], tuple[Arrays, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Golden:
    """One batch of sequences and PyTorch's answers in float64.

    Attributes:
        inputs: By name, each (batch, time, *shape).
        state: The state rows before the sequences, (batch, state_size) float32. Row 0 is the model's initial state.
        outputs: By name, each (batch, time, *shape) or (batch, *shape) without time; float64 unless integer.
        state_out: The state rows after the sequences, (batch, state_size) float64.
        chunkings: Ways to cut the time steps into chunks; the chunks of each add up to them.
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
        """Return the first sequences."""
        return type(self)(
            {name: array[:count] for name, array in self.inputs.items()},
            self.state[:count],
            {name: array[:count] for name, array in self.outputs.items()},
            self.state_out[:count],
            self.chunkings,
        )

    def to_bytes(self) -> bytes:
        """Return the content of `golden.safetensors`."""
        tensors = {f"input.{name}": array for name, array in self.inputs.items()}
        tensors |= {f"output.{name}": array for name, array in self.outputs.items()}
        tensors |= {f"chunking.{i}": np.array(chunks) for i, chunks in enumerate(self.chunkings)}
        tensors |= {"state": self.state, "state_out": self.state_out}
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
            return cls(
                inputs={n.removeprefix("input."): a for n, a in tensors.items() if n.startswith("input.")},
                state=tensors["state"],
                outputs={n.removeprefix("output."): a for n, a in tensors.items() if n.startswith("output.")},
                state_out=tensors["state_out"],
                chunkings=tuple(tuple(tensors[f"chunking.{i}"].tolist()) for i in range(count)),
            )
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"golden vectors cannot be read: {error}") from error
