"""Measures the processor time of one step of one session: served, and in the package's own code."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import torch

from conformance.packages.entry import Entry
from unroll import bundle
from unroll.service.engine.host_engine import StepBuffers
from unroll.service.engine.runner import Runner

#: Time steps per call of the package, turns, and processor time per turn, in seconds.
_STEPS, _TURNS, _SECONDS = 64, 15, 0.05


def step_cost(entry: Entry, folder: Path, given: dict[str, Any]) -> tuple[float, float]:
    """Take turns with one thread each; returns microseconds of a step in onnxruntime, and in the package's own code.

    The package's own code is its streaming call, or else `forward` of a sequence of one step.

    Args:
        entry: the module.
        folder: its bundle.
        given: inputs (batch, time, ...) by name.
    """
    torch.set_num_threads(1)
    served, own = _served(folder, given), _own(entry, given)  # a package may train its module
    with torch.inference_mode():
        turns = [(_per_call(served), _per_call(own)) for _ in range(_TURNS + 1)][1:]
    ours, theirs = (1e6 * median(side) for side in zip(*turns, strict=True))
    return ours, theirs / (_STEPS if entry.own else 1)


def _served(folder: Path, given: dict[str, Any]) -> Callable[[], Any]:
    read = bundle.read(folder)
    call = StepBuffers(Runner(read.model, read.manifest), read.manifest, 1).call(1)
    for spec, array in zip(read.manifest.inputs, call.inputs, strict=True):
        array[:] = given[spec.name][:1, :1]
    call.state[:] = read.manifest.blank_row()

    def step() -> None:
        call.run()
        np.copyto(call.state, call.state_out)

    return step


def _own(entry: Entry, given: dict[str, Any]) -> Callable[[], Any]:
    model, steps = entry.build(), _STEPS if entry.own else 1
    inputs = {name: torch.from_numpy(array[:1, :steps]) for name, array in given.items()}
    if entry.own:
        return lambda: entry.own(model, inputs)  # type: ignore[misc]
    return lambda: model(**inputs)


def _per_call(call: Callable[[], Any]) -> float:
    """Processor time of a call, in seconds."""
    begin, calls = process_time(), 0
    while (spent := process_time() - begin) < _SECONDS:
        call()
        calls += 1
    return spent / calls
