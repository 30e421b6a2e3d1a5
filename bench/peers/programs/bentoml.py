"""BentoML: one service with one worker. The program starts `bentoml serve`, whose worker imports the service."""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

import bentoml
import numpy as np
from pydantic import BaseModel

from bench.peers.programs.arguments import Arguments, arguments
from bench.peers.programs.served import Request, Served

_MODELS = "BENCH_MODELS"
_PR_SET_PDEATHSIG = 1


class Step(BaseModel):
    model: str
    session: str
    inputs: list[float]
    start: bool = False


@bentoml.service(workers=1, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class Steps:
    def __init__(self) -> None:
        _end_with_parent()
        models = json.loads(os.environ[_MODELS])
        self._served = {name: Served(Path(path)) for name, path in models.items()}

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=60_000)
    async def steps(self, requests: list[Step]) -> list[list[float]]:
        outputs: dict[int, list[float]] = {}
        for model, served in self._served.items():
            numbers = [number for number, step in enumerate(requests) if step.model == model]
            for number, y in zip(numbers, served.answer([_request(requests[n]) for n in numbers]), strict=True):
                outputs[number] = y[0].tolist()
        return [outputs[number] for number in range(len(requests))]

    @bentoml.api
    async def sequences(self, values: bytes, /, ctx: bentoml.Context) -> bytes:
        served = self._served[ctx.request.headers["model"]]
        x = np.frombuffer(values, np.float32).reshape(-1, served.features)
        return served.answer([Request(None, True, x)])[0].tobytes()


def _request(step: Step) -> Request:
    return Request(step.session, step.start, np.array([step.inputs], np.float32))


def _end_with_parent() -> None:
    """End with the parent: the worker has its own process group, which the server's signals do not reach."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(given: Arguments) -> None:
    os.environ[_MODELS] = json.dumps({name: str(path) for name, path in given.models.items()})
    os.environ["BENTOML_HOME"] = str(given.folder)
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    words = f"-m bentoml serve bench.peers.programs.bentoml:Steps --host 127.0.0.1 --port {given.port}"
    os.execv(sys.executable, [sys.executable, *words.split()])


if __name__ == "__main__":
    main(arguments())
