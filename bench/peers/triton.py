"""Triton, with requests as its own client sends them: binary tensors after a JSON head, sequence in the parameters."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.http_client import infer
from bench.peers.peer import Peer


@dataclass(frozen=True)
class Triton(Peer):
    """Triton with one strategy of its sequence batcher. Only one peer runs whole sequences, which do not use it."""

    program = "triton"
    strategy: str = "oldest"
    whole_sequences: bool = True

    def command(self, python: Path, models: Mapping[str, Path], folder: Path) -> tuple[str, ...]:
        return (*super().command(python, models, folder), f"--strategy={self.strategy}")

    def step(self, model: str, client: int, index: int, row: np.ndarray) -> bytes:
        # 0 would mean no sequence.
        return infer(model, row[None], sequence_id=client + 1, sequence_start=index == 0, sequence_end=False)

    def sequence(self, model: str, values: np.ndarray) -> bytes | None:
        return infer(f"{model}-sequences", values) if self.whole_sequences else None

    def outputs(self, body: bytes, features: int) -> np.ndarray:
        _, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
        return np.frombuffer(body, np.float32, offset=end)


_ENVIRONMENT = ("nvidia-pytriton==0.7.0", "numpy==1.26.4", "onnxruntime==1.32.0")
_TUNED = (
    "Python backend with one call of onnxruntime per batch, states in one array, no control tensors that it can do "
    "without, binary tensors, no queue delay (500 µs was no faster), one thread, no metrics, no logs"
)

TRITON = Triton(
    "triton", f"Triton 2.51, sequence batcher `oldest`: {_TUNED}", _ENVIRONMENT, ready_path="/v2/health/ready"
)
TRITON_DIRECT = Triton(
    "triton-direct",
    f"Triton 2.51, sequence batcher `direct`: {_TUNED}",
    _ENVIRONMENT,
    ready_path="/v2/health/ready",
    strategy="direct",
    whole_sequences=False,
)
