"""What is measured: how each server is started, and what its requests and replies look like."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import numpy as np

from bench.servers import HOST, ServerFailed

#: The model's name, and how many values it takes and gives in a step.
MODEL, FEATURES = "bench", 16
_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Subject:
    """command: with the word PORT where the port belongs. path: of a step, with {} for the client's number.
    stateful: it runs the model, so that its answers can be checked. open: makes the session of a client."""

    name: str
    what: str
    command: tuple[str, ...]
    path: str
    stateful: bool = False
    json: bool = False
    open: Callable[[HTTPConnection, int], None] = lambda connection, client: None

    def requests(self, client: int, values: np.ndarray) -> list[bytes]:
        """One request for each row of `values`: (steps, features)."""
        return [self._request(self.path.format(client), row) for row in values]

    def _request(self, path: str, row: np.ndarray) -> bytes:
        if self.json:
            media, body = "application/json", json.dumps({"inputs": [row.tolist()]}).encode()
        else:
            media, body = "application/octet-stream", row.tobytes()
        head = f"POST {path} HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: {media}\r\ncontent-length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def outputs(self, body: bytes) -> np.ndarray:
        """The values in a reply: (outputs,) float32."""
        if self.json:
            return np.array(json.loads(body)["outputs"][0], np.float32)
        return np.frombuffer(body, np.float32)

    def open_all(self, port: int, clients: int) -> None:
        connection = HTTPConnection(HOST, port, timeout=_TIMEOUT)
        for client in range(clients):
            self.open(connection, client)
        connection.close()


def subjects(repository: Path, *, json_bodies: bool) -> list[Subject]:
    """In the order in which they take turns."""
    python = sys.executable
    serve = f"-m unroll serve --repository {{}} --host {HOST} --port PORT --device cpu --log-level warning"
    unroll = (python, *(word.format(repository) for word in serve.split()))
    model = str(repository / MODEL / "1" / "model.onnx")
    found = [
        Subject("ceiling", "canned replies", (python, "-m", "bench.peers.canned", "PORT"), "/"),
        Subject("echo", "bare uvicorn", (python, "-m", "bench.peers.echo", "PORT"), "/"),
        Subject("unroll", "Unroll", unroll, _path("raw"), stateful=True, open=_open("raw")),
        Subject(
            "naive",
            "FastAPI, dict of states",
            (python, "-m", "bench.peers.naive", model, "PORT"),
            "/sessions/{}/steps",
            stateful=True,
        ),
    ]
    if json_bodies:
        found.insert(
            3,
            Subject("unroll-json", "Unroll, JSON bodies", unroll, _path("json"), True, json=True, open=_open("json")),
        )
    return found


def _path(prefix: str) -> str:
    return f"/v1/models/{MODEL}/sessions/{prefix}-{{}}/steps"


def _open(prefix: str) -> Callable[[HTTPConnection, int], None]:
    def open_session(connection: HTTPConnection, client: int) -> None:
        body = json.dumps({"session_id": f"{prefix}-{client}"})
        connection.request("POST", f"/v1/models/{MODEL}/sessions", body, {"content-type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 201:
            raise ServerFailed(f"no session for client {client}: {reply.status} {reply.read()!r}")
        reply.read()

    return open_session
