"""FastAPI and a dictionary of states: a first version, and one tuned after a first measurement."""

import json
from dataclasses import dataclass

import numpy as np

from bench.http_client import post
from bench.peers.peer import Peer


@dataclass(frozen=True)
class Naive(Peer):
    program = "naive"

    def step(self, model: str, client: int, index: int, row: np.ndarray) -> bytes:
        body: dict[str, object] = {"session_id": str(client), "inputs": [row.tolist()]}
        if index == 0:
            body["reset"] = True
        return post(f"/models/{model}/steps", body)

    def sequence(self, model: str, values: np.ndarray) -> bytes:
        return post(f"/models/{model}/sequences", {"inputs": values.tolist()})

    def outputs(self, body: bytes, features: int) -> np.ndarray:
        return np.array(json.loads(body)["outputs"], np.float32).ravel()


@dataclass(frozen=True)
class NaiveRaw(Peer):
    program = "naive_raw"

    def step(self, model: str, client: int, index: int, row: np.ndarray) -> bytes:
        session = f"/models/{model}/sessions/{client}"
        return post(session if index == 0 else f"{session}/steps", row.tobytes())

    def sequence(self, model: str, values: np.ndarray) -> bytes:
        return post(f"/models/{model}/sequences", values.tobytes())

    def outputs(self, body: bytes, features: int) -> np.ndarray:
        return np.frombuffer(body, np.float32)


NAIVE = Naive(
    "naive",
    "FastAPI with pydantic JSON bodies and a dict of states; onnxruntime with its defaults; no access log",
    ready_path="/openapi.json",
)
NAIVE_RAW = NaiveRaw(
    "naive-raw",
    "the same with raw bytes in and out instead of JSON and pydantic, and one onnxruntime thread",
    ready_path="/openapi.json",
)
