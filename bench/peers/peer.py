"""Interface of a server to compare with: how to start it, ask it and read its answers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Peer(ABC):
    """A server to compare with.

    Attributes:
        what: one line for the report, with the tuning.
        environment: pinned requirements of its own venv; empty to run in this interpreter.
        ready_path: answers a GET with 200 once the server is ready.
    """

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
        """A request with a whole sequence (time, features) from a zero state; None if it is not supported."""
        return None

    @abstractmethod
    def outputs(self, body: bytes, features: int) -> np.ndarray:
        """The values in a reply's body, flat float32; `features` is the number of values per time step."""
