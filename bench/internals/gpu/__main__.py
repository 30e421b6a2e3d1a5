"""`python -m bench.internals.gpu`: all measurements on a GPU, in one run of a few minutes."""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from bench import machine
from bench.internals.gpu import pytorch, steps, stream
from bench.internals.gpu.documents import write
from bench.internals.gpu.engine import inputs, open_engine, some_slots, steps_of
from bench.internals.gpu.shapes import FEATURES, Shape, bundle_of, model
from bench.servers import ROOT

MEDIUM, LARGE, WIDE = Shape("LSTM", 2, 256), Shape("LSTM", 2, 1024), Shape("GRU", 4, 2048)
MEDIUM_GRU = Shape("GRU", 2, 256)
RESULTS = ROOT / ".bench" / "gpu.json"

#: Shape, rows, precision.
STEPS: list[tuple[Shape, list[int], Any]] = [
    (MEDIUM, [1, 64, 256, 1024], "float32"),
    (MEDIUM, [1, 64, 256, 1024], "tf32"),
    (MEDIUM_GRU, [1, 64, 256, 1024], "float32"),
    (LARGE, [64, 1024], "float32"),
    (LARGE, [64, 1024], "tf32"),
    (WIDE, [64, 256], "float32"),
    (WIDE, [64], "tf32"),
]
#: Shape, connections, sessions in a frame.
STREAMS = [(MEDIUM, 4, 256), (MEDIUM, 4, 1024), (LARGE, 4, 1024), (WIDE, 4, 256)]
_SEQUENCES, _LENGTH = 32, 512


class Run:
    def __init__(self, repository: Path, folder: Path, turns: int, seconds: float) -> None:
        self.repository, self.folder = repository, folder
        self.turns, self.seconds = turns, seconds
        self.count = 300
        self._limits: steps.Limits | None = None
        self._steps: list[steps.Steps] = []

    def limits(self) -> dict[str, float]:
        self._limits = steps.Limits.measured()
        return asdict(self._limits)

    def steps(self) -> list[dict[str, Any]]:
        assert self._limits is not None
        for shape, sizes, precision in STEPS:
            self._steps += steps.measure(shape, sizes, precision, self._limits, self.repository, self.turns, self.count)
        return [asdict(each) | {"steps_per_second": each.steps_per_second} for each in self._steps]

    def sequences(self) -> list[dict[str, Any]]:
        """Seconds for a batch of whole sequences, from host memory to host memory."""
        found = []
        x = inputs(_SEQUENCES, _LENGTH)
        for precision in ("float32", "tf32"):
            pytorch.set_tf32(precision == "tf32")
            torch_sequences = pytorch.sequences(model(MEDIUM).cuda(), x)
            with open_engine(bundle_of(MEDIUM, self.repository), 100, [_SEQUENCES], precision) as engine:
                engine_sequences = engine.sequences(x)
                assert np.allclose(engine_sequences(), torch_sequences(), rtol=0, atol=5e-3)
                each = [(_seconds(engine_sequences), _seconds(torch_sequences)) for _ in range(self.turns)]
            engine_seconds, torch_seconds = (median(seconds) for seconds in zip(*each, strict=True))
            found.append(
                {"title": MEDIUM.title, "precision": precision, "ours": engine_seconds, "torch": torch_seconds}
            )
        return found

    def resident(self) -> dict[str, float]:
        found = steps.resident(MEDIUM, 256, self.repository, self.turns, 10 * self.count)
        return {str(sessions): micro for sessions, micro in found.items()}

    def proof(self) -> list[dict[str, Any]]:
        """Differences from PyTorch float64 on the golden vectors, and between buckets."""
        found = []
        for precision in ("float32", "tf32", "float16"):
            with open_engine(bundle_of(MEDIUM, self.repository), 5000, [1, 4, 16, 64, 256, 1024], precision) as engine:
                tolerance = {entry.output: entry.tolerance for entry in engine.manifest.parity}
                found.append({"precision": precision, "tolerance": tolerance, **asdict(engine.proof)})
        return found

    def streams(self) -> list[dict[str, Any]]:
        found = []
        for shape, connections, entries in STREAMS:
            with open_engine(bundle_of(shape, self.repository), 5000, [entries]) as engine:
                rows = steps_of(some_slots(entries, 5000), inputs(entries))
                rate = entries / median(engine.seconds_per_step([rows], self.count) for _ in range(self.turns))
            each = stream.measure(shape, connections, entries, rate, self.repository, self.seconds, self.folder)
            found.append(asdict(each))
        return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.internals.gpu", description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of each measurement over WebSockets")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--write-docs", type=Path, metavar="FILE", help="only write docs/gpu.md from such results")
    arguments = parser.parse_args()
    if arguments.write_docs:
        write(json.loads(arguments.write_docs.read_text()), ROOT / "docs")
        return 0
    repository = ROOT / ".bench" / "gpu"
    results: dict[str, Any] = {"about": _about(), "turns": arguments.turns}
    failed = False
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        run = Run(repository, Path(folder), arguments.turns, arguments.seconds)
        _export(repository)
        parts: list[Callable[[], Any]] = [
            run.limits, run.steps, run.sequences, run.resident, run.proof, run.streams,
        ]  # fmt: skip
        for part in parts:
            began = perf_counter()
            try:
                results[part.__name__] = part()
            except (AssertionError, OSError, RuntimeError, ValueError) as error:
                results[part.__name__], failed = {"failed": repr(error)}, True
            print(f"{part.__name__} ({perf_counter() - began:.0f} s)", json.dumps(results[part.__name__]), flush=True)
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(failed)


def _export(repository: Path) -> None:
    """Export the models in parallel: each export occupies one core for a while."""
    shapes = dict.fromkeys(shape for shape, *_ in STEPS)
    with ProcessPoolExecutor(len(shapes), mp_context=get_context("spawn")) as pool:
        list(pool.map(bundle_of, shapes, [repository] * len(shapes)))


def _about() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    about = machine.describe([])
    about["command"] = ["python", "-m", "bench.internals.gpu"]
    about["versions"] |= {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
    }
    return about | {"gpu": gpu, "features": FEATURES}


def _seconds(call: Callable[[], object]) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began


if __name__ == "__main__":
    raise SystemExit(main())
