"""Bare onnxruntime: the throughput of a model on one core, with inputs ready in memory.

`python -m bench.raw MODEL` reads lines of `batch steps seconds` and answers each with a line of JSON, so that it can
take turns with the servers. `RawModel` is its client.
"""

import json
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench.load import Measurement, repeated
from bench.reference import runner
from bench.servers import ROOT, ServerFailed, on_cores


class RawModel:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def measure(self, batch: int, steps: int, seconds: float) -> Measurement:
        """Call the model with (batch, steps, features). The rate is in rows per second, latencies are per call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{batch} {steps} {seconds}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise ServerFailed(f"onnxruntime alone ended with status {self._process.wait()}")
        return Measurement(**json.loads(answer))


@contextmanager
def raw_model(path: Path, cores: Collection[int]) -> Iterator[RawModel]:
    with on_cores(cores):
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.raw", str(path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    try:
        yield RawModel(process)
    finally:
        process.kill()
        process.communicate()


def _measure(session: object, batch: int, steps: int, seconds: float) -> Measurement:
    shapes = {node.name: node.shape for node in session.get_inputs()}  # type: ignore[attr-defined]
    x = np.random.default_rng(0).standard_normal((batch, steps, shapes["x"][-1]), np.float32)
    state = np.zeros((batch, shapes["state"][-1]), np.float32)
    feeds = {"x": x, "state": state, "sequence_lens": np.full(batch, steps, np.int32)}
    run, names = session.run, ["y", "state_out"]  # type: ignore[attr-defined]
    for _ in range(3):
        run(names, feeds)
    return repeated(lambda: run(names, feeds), seconds, batch)


def _answer_all() -> None:
    session = runner(Path(sys.argv[1]))
    for line in sys.stdin:
        batch, steps, seconds = line.split()
        print(json.dumps(asdict(_measure(session, int(batch), int(steps), float(seconds)))), flush=True)


if __name__ == "__main__":
    _answer_all()
