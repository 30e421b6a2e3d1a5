"""A model and its clients' states, for a single worker of a server without sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort


@dataclass(frozen=True)
class Request:
    """A request with x (time, features) float32; `session` is None for a whole sequence from a zero state."""

    session: str | None
    start: bool
    x: np.ndarray


class Served:
    """A model with its clients' states. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        shapes = {node.name: node.shape for node in self._session.get_inputs()}
        self.features: int = shapes["x"][2]
        self._zeros = np.zeros(shapes["state"][1], np.float32)
        self._states: dict[str, np.ndarray] = {}

    def answer(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """Outputs of each request, (time, outputs). Steps of one session are applied in the given order."""
        outputs: dict[int, np.ndarray] = {}
        waiting = dict(enumerate(requests))
        while waiting:
            chosen = _compatible(waiting)
            outputs.update(zip(chosen, self._run([waiting.pop(number) for number in chosen]), strict=True))
        return [outputs[number] for number in range(len(requests))]

    def _run(self, requests: Sequence[Request]) -> np.ndarray:
        x = np.stack([request.x for request in requests])
        state = np.stack([self._state(request) for request in requests])
        lens = np.full(len(requests), x.shape[1], np.int32)
        y, states = self._session.run(["y", "state_out"], {"x": x, "state": state, "sequence_lens": lens})
        for request, row in zip(requests, states, strict=True):
            if request.session is not None:
                self._states[request.session] = row
        return y

    def _state(self, request: Request) -> np.ndarray:
        if request.session is None or request.start:
            return self._zeros
        return self._states[request.session]


def _compatible(waiting: dict[int, Request]) -> list[int]:
    """The requests that can share a call: equally long as the first, and at most one step per session, in order."""
    length = len(next(iter(waiting.values())).x)
    chosen: list[int] = []
    met: set[str] = set()
    for number, request in waiting.items():
        if len(request.x) == length and (request.session is None or request.session not in met):
            chosen.append(number)
        if request.session is not None:
            met.add(request.session)
    return chosen
