"""LitServe with raw bytes; the session's name is a header."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bench.http_client import post
from bench.peers.peer import Peer


@dataclass(frozen=True)
class LitServe(Peer):
    program = "litserve"

    def step(self, model: str, client: int, index: int, row: np.ndarray) -> bytes:
        session = {"session": str(client)}
        return self._request(model, row, {**session, "start": "1"} if index == 0 else session)

    def sequence(self, model: str, values: np.ndarray) -> bytes:
        return self._request(model, values, {})

    def _request(self, model: str, x: np.ndarray, headers: Mapping[str, str]) -> bytes:
        return post(f"/{model}", x.tobytes(), headers)

    def outputs(self, body: bytes, features: int) -> np.ndarray:
        return np.frombuffer(body, np.float32)


LITSERVE = LitServe(
    "litserve",
    "LitServe, one worker per model with a dict of states; batches of up to 64 within 10 ms, raw bytes, one thread, "
    "no access log; more workers would mix states",
    ("litserve==0.2.19", "fastapi==0.165.0", "numpy==2.4.6", "onnxruntime==1.32.0"),
    ready_path="/health",
)
