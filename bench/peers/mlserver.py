"""MLServer with the Open Inference Protocol's JSON, the only form that its REST server supports.

The session is a tensor like x: parameters of requests in the same batch would overwrite each other.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bench.http_client import post
from bench.peers.peer import Peer


@dataclass(frozen=True)
class MLServer(Peer):
    program = "mlserver"

    def step(self, model: str, client: int, index: int, row: np.ndarray) -> bytes:
        session = {"name": "session", "datatype": "INT64", "shape": [1, 1], "data": [client]}
        start = {"name": "start", "datatype": "BOOL", "shape": [1, 1], "data": [index == 0]}
        return _infer(model, row[None], session, start)

    def sequence(self, model: str, values: np.ndarray) -> bytes:
        return _infer(f"{model}-sequences", values)

    def outputs(self, body: bytes, features: int) -> np.ndarray:
        return np.array(json.loads(body)["outputs"][0]["data"], np.float32)


def _infer(model: str, x: np.ndarray, *others: Mapping[str, object]) -> bytes:
    """x: (time, features)."""
    values = {"name": "x", "datatype": "FP32", "shape": [1, *x.shape], "data": x.ravel().tolist()}
    return post(f"/v2/models/{model}/infer", {"inputs": [values, *others]})


MLSERVER = MLServer(
    "mlserver",
    "MLServer, in its own process with a dict of states; adaptive batches of up to 64 within 1 ms, httptools, one "
    "thread, no metrics, no compression, no access log; sequences are a model apart, as its batches want equal "
    "lengths; parallel workers would mix states",
    ("mlserver==1.7.1", "httptools==0.9.0", "numpy==2.4.6", "onnxruntime==1.32.0"),
    ready_path="/v2/health/ready",
)
