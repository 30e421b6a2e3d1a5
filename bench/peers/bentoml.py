"""BentoML: JSON for steps, which it can batch; raw bytes for sequences, where the body's size outweighs its own cost.

For a bytes body it derives a JSON schema in every request, which costs more than the JSON of one step.
"""

import json
from dataclasses import dataclass

import numpy as np

from bench.http_client import post
from bench.peers.peer import Peer


@dataclass(frozen=True)
class BentoML(Peer):
    program = "bentoml"

    def step(self, model: str, client: int, index: int, row: np.ndarray) -> bytes:
        step: dict[str, object] = {"model": model, "session": str(client), "inputs": row.tolist()}
        if index == 0:
            step["start"] = True
        return post("/steps", {"requests": [step]})

    def sequence(self, model: str, values: np.ndarray) -> bytes:
        return post("/sequences", values.tobytes(), {"model": model})

    def outputs(self, body: bytes, features: int) -> np.ndarray:
        if body.startswith(b"[["):  # a step's JSON; as float32 it would be near 1e17
            return np.array(json.loads(body)[0], np.float32)
        return np.frombuffer(body, np.float32)


BENTOML = BentoML(
    "bentoml",
    "BentoML, one worker with a dict of states; async, adaptive batches of up to 64 steps (JSON; raw bytes were slower "
    "for steps), sequences as raw bytes, uvloop and httptools, one thread, no metrics, no access log; more workers "
    "would mix states",
    ("bentoml==1.4.40", "httptools==0.9.0", "uvloop==0.23.0", "numpy==2.4.6", "onnxruntime==1.32.0"),
    ready_path="/readyz",
)
