"""Runs one module through `unroll export`, `unroll verify` and a server, and compares its sessions with the module.

Runs in the package's own environment: `python -m conformance.packages.trial ENTRY` prints a Result as JSON.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.servers import running_server
from conformance.packages.entries import ENTRIES
from conformance.packages.entry import Entry
from conformance.packages.step_cost import step_cost
from unroll import bundle
from unroll.client import Client
from unroll.export.lifting.float64 import converted, double_precision
from unroll.export.lifting.float64 import exact as as_double

_STEPS, _SESSIONS, _SECONDS = 2048, 3, 900

#: Time steps per request.
_CHUNKS = 1, 2, 3, 100

#: Tolerance relative to the largest output; float32 rounding stays below it.
_CLOSE = 1e-4


@dataclass
class Result:
    """The result of one module.

    Attributes:
        outcome: streams, whole only, refused, wrong (answers differ from the module's), or failed (without a code).
        says: the code and the reason.
        seconds: processor time of the export.
        served_us, package_us: processor time of a step in onnxruntime, and in the package's own code.
        error: the largest difference from the module's answer for the whole sequence, relative to the largest output.
        own: the same against the package's streaming call.
        steps: time steps per session.
        decisions: how many decisions with real data were compared.
    """

    version: str
    outcome: str = "failed"
    says: str = ""
    seconds: float = 0.0
    served_us: float | None = None
    package_us: float | None = None
    error: float | None = None
    own: float | None = None
    steps: int | None = None
    decisions: int = 0


def measure(entry: Entry) -> Result:
    result = Result(importlib.metadata.version(entry.package))
    with tempfile.TemporaryDirectory() as name:
        repository = Path(name)
        exported = _unroll("export", *_arguments(entry, repository))
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        result.seconds = spent.ru_utime + spent.ru_stime
        line = next((x for x in exported.stderr.splitlines() if x.startswith("unroll export: ")), "")
        if exported.returncode:
            result.outcome = "refused" if line else "failed"
            result.says = line.removeprefix("unroll export: ") or exported.stderr.strip()[-200:]
            return result
        manifest = bundle.read(repository / "m" / "1").manifest
        result.outcome = "streams" if manifest.streamable else "whole only"
        result.says = manifest.not_streamable_because or ""
        verified = _unroll("verify", str(repository / "m" / "1"))
        if verified.returncode:
            result.outcome, result.says = "failed", f"unroll verify: {verified.stderr.strip()[-200:]}"
            return result
        close = _compare(entry, manifest, repository, result)
    if any(error is not None and not error <= close for error in (result.error, result.own)):
        result.outcome = "wrong"
    return result


def _arguments(entry: Entry, repository: Path) -> list[str]:
    inputs = [word for spec in entry.inputs for word in ("--input", spec)]
    random = [] if entry.trained else ["--random-weights"]
    target = f"{entry.build.__module__}:{entry.name}"
    return [target, *inputs, *random, *entry.options, "--name", "m", "--repository", str(repository)]


def _unroll(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "unroll", *words], capture_output=True, text=True, timeout=_SECONDS)


def _compare(entry: Entry, manifest: bundle.Manifest, repository: Path, result: Result) -> float:
    """Fills in the errors; returns what they may be."""
    rng, real = np.random.default_rng(5), entry.real() if entry.real else None
    if real:
        given = {name: values.numpy() for name, values in real.inputs.items()}
    else:
        given = {spec.name: _drawn(spec, rng) for spec in manifest.inputs}
    result.steps = next(iter(given.values())).shape[1]
    if manifest.streamable:
        result.served_us, result.package_us = step_cost(entry, repository / "m" / "1", given)
    with torch.no_grad():
        model = entry.build()
        whole = [] if entry.step else _leaves(model(**{name: torch.from_numpy(a) for name, a in given.items()}))
    command = [sys.executable, "-m", "unroll", "serve", "--repository", str(repository), "--port", "PORT"]
    with (
        running_server(command, os.sched_getaffinity(0), repository / "log", "/readyz") as server,
        Client(f"http://127.0.0.1:{server.port}") as client,
    ):
        if manifest.streamable:
            served = _sessions(client, given, rng, {spec.name for spec in manifest.outputs if spec.time})
        else:
            rows = [{name: array[row] for name, array in given.items()} for row in range(_SESSIONS)]
            served = [_by_name(answer) for answer in client.sequences("m", rows)]
    if real:
        result.decisions = len(real.own)
        if real.decide(np.stack([row["y"] for row in served])) != real.own:
            result.outcome, result.says = "wrong", "decisions differ"
    if not entry.step:
        result.error = max(_difference(np.stack([answer[name] for answer in served]), whole) for name in served[0])
    if entry.own and manifest.streamable:
        result.own = max(_own_error(entry, given, row, served[row]) for row in range(_SESSIONS))
    if result.error is None or result.error <= _CLOSE:
        return _CLOSE
    with torch.no_grad(), double_precision():
        exact = _leaves(
            converted(model, torch.float64)(**{n: as_double(torch.from_numpy(a)) for n, a in given.items()})
        )
    rounding = max(_difference(one, [other]) for one, other in zip(whole, exact, strict=True))
    return 4 * rounding if rounding <= _CLOSE else _CLOSE


def _drawn(spec: bundle.TensorSpec, rng: np.random.Generator) -> Any:
    shape = (_SESSIONS, _STEPS, *spec.shape)
    if spec.numpy == np.bool_:  # a mask that marks the start of an episode
        return rng.random(shape) < 0.01
    if np.issubdtype(spec.numpy, np.floating):
        return rng.standard_normal(shape).astype(spec.numpy)
    return rng.integers(0, spec.limit or 2, shape).astype(spec.numpy)


def _sessions(client: Client, given: dict[str, Any], rng: np.random.Generator, timed: set[str]) -> list[dict[str, Any]]:
    """Run three interleaved sessions in random chunks; returns their outputs.

    For outputs not in `timed`, which have no value per step, the last value counts.
    """
    sessions = [client.session("m") for _ in range(_SESSIONS)]
    at, pieces = [0] * _SESSIONS, [[] for _ in sessions]  # type: ignore[var-annotated]
    steps = next(iter(given.values())).shape[1]
    while min(at) < steps:
        row = int(rng.choice([row for row in range(_SESSIONS) if at[row] < steps]))
        end = min(steps, at[row] + int(rng.choice(_CHUNKS)))
        pieces[row].append(
            _by_name(sessions[row].steps({name: array[row, at[row] : end] for name, array in given.items()}))
        )
        at[row] = end
    for session in sessions:
        session.close()
    return [
        {name: np.concatenate([p[name] for p in row]) if name in timed else last for name, last in row[-1].items()}
        for row in pieces
    ]


def _by_name(answer: Any) -> dict[str, Any]:
    return answer if isinstance(answer, dict) else {"y": answer}


def _own_error(entry: Entry, given: dict[str, Any], row: int, served: dict[str, Any]) -> float:
    """The error against the package's streaming call on a single row."""
    assert entry.own is not None
    with torch.no_grad():
        stepped = entry.own(
            entry.build(), {name: torch.from_numpy(array[row : row + 1]) for name, array in given.items()}
        )
    return min(_difference(array, [stepped.numpy()]) for array in served.values())


def _leaves(returned: Any) -> list[Any]:
    return [leaf.numpy() for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]


def _difference(found: Any, candidates: list[Any]) -> float:
    """The smallest relative difference from a candidate of the same shape."""
    return min(
        (
            float(np.max(np.abs(found - one))) / max(1.0, float(np.max(np.abs(one))))
            for one in candidates
            if one.shape == found.shape
        ),
        default=float("inf"),
    )


def main(name: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # packages print
        result = measure(ENTRIES[name])
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main(sys.argv[1])
