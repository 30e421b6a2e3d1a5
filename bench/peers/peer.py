"""Interface of a server to compare with: how to start it, ask it and read its answers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Peer(ABC):
    """what: one line for the report, with the tuning. environment: pinned requirements of its own venv; empty: runs in
    this interpreter. ready_path: a GET there is answered with 200 once it can serve."""

    name: str
    what: str
    environment: tuple[str, ...] = ()
    ready_path: str | None = None

    #: The server's module in bench.peers.programs.
    program: ClassVar[str]

    def command(self, python: Path, models: Mapping[str, Path], folder: Path) -> tuple[str, ...]:
        """The command, with the word PORT in place of the port, for a folder where `bench` can be imported.

        models: name → model.onnx. folder: empty, for files that the server needs.
        """
        served = (f"{name}={path}" for name, path in models.items())
        return (str(python), "-m", f"bench.peers.programs.{self.program}", "PORT", str(folder), *served)

    @abstractmethod
    def step(self, model: str, client: int, index: int, row: np.ndarray) -> bytes:
        """The client's request number `index`, one time step; 0 always starts from a zero state.

        row: (features,) float32.
        """

    def sequence(self, model: str, values: np.ndarray) -> bytes | None:
        """A whole sequence from a zero state, without a session; None: not offered. values: (time, features)."""
        return None

    @abstractmethod
    def outputs(self, body: bytes, features: int) -> np.ndarray:
        """Values of a reply's body, flat float32. features: number of values of one time step."""
