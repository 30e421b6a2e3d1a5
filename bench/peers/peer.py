"""What the benchmark must know of a server that it compares with: how it is started, asked and read."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

BINARY, JSON = "application/octet-stream", "application/json"


@dataclass(frozen=True)
class Peer(ABC):
    """what: one line for the report, with what was tuned. environment: what pip installs into the venv that it runs
    in, versions pinned; empty: our own interpreter. ready_path: a GET there is answered 200 once it can serve."""

    name: str
    what: str
    environment: tuple[str, ...] = ()
    ready_path: str | None = None

    #: The module below bench.peers.programs that is the server.
    program: ClassVar[str]

    def command(self, python: Path, models: Mapping[str, Path], folder: Path) -> tuple[str, ...]:
        """With the word PORT where the port belongs; to be run where `bench` can be imported.
        models: name → model.onnx. folder: empty, for what the server wants written before it starts."""
        served = (f"{name}={path}" for name, path in models.items())
        return (str(python), "-m", f"bench.peers.programs.{self.program}", "PORT", str(folder), *served)

    @abstractmethod
    def step(self, model: str, client: int, index: int, row: np.ndarray) -> bytes:
        """The client's request number `index`, one time step; 0 starts from a zero state whatever was before.
        row: (features,) float32."""

    def sequence(self, model: str, values: np.ndarray) -> bytes | None:
        """A whole sequence, from a zero state that no one keeps; None: not offered. values: (time, features)."""
        return None

    @abstractmethod
    def outputs(self, body: bytes, features: int) -> np.ndarray:
        """The values in a reply's body, flat: float32. features: how many there are for one time step."""


def post(path: str, body: bytes, media: str | None, headers: Mapping[str, str] | None = None) -> bytes:
    """A whole request, as on a connection that stays open."""
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(body)}"]
    if media:
        lines.append(f"content-type: {media}")
    lines.extend(f"{name}: {value}" for name, value in (headers or {}).items())
    return "\r\n".join([*lines, "\r\n"]).encode() + body
