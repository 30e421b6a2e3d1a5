"""Runs many small jobs in child processes, isolated from each other.

Each child is forked from a server that has only imported the jobs' dependencies, so it is as clean as a new process.
"""

import gc
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any

#: The imports of this package's jobs.
PRELOAD = [
    "torch",
    "onnxscript",
    "onnxruntime",
    "onnx",
    "torch.onnx",
    "torch.export",
    "unroll.export",
    "conformance.preload",
]

Job = Any


@dataclass(frozen=True)
class Died:
    """The outcome of a job without a result: `crashed` with the exit code, or `timed out`."""

    reason: str


@dataclass
class _Child:
    process: BaseProcess
    pipe: Connection
    jobs: list[Job]
    deadline: float


def run(
    work: Callable[[Job], Any],
    jobs: Sequence[Job],
    *,
    children: int = 2,
    each: int = 1,
    seconds: float = 120,
    preload: Sequence[str] = PRELOAD,
) -> Iterator[tuple[Job, Any]]:
    """Yield every job with the result of `work`, or with Died, in order of completion.

    Args:
        work: a function of one job; it and the jobs are pickled.
        jobs: the jobs.
        children: the number of concurrent processes.
        each: jobs per child, run in sequence.
        seconds: time limit per job.
        preload: modules to import once for all children.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    waiting = [list(jobs[start : start + each]) for start in range(0, len(jobs), each)]
    running: list[_Child] = []
    try:
        while waiting or running:
            while waiting and len(running) < children:
                running.append(_start(context, work, waiting.pop(0), seconds))
            nearest = min(child.deadline for child in running)
            wait([child.pipe for child in running], timeout=max(0.0, nearest - monotonic()))
            for child in list(running):
                answer = _answer(child)
                if answer is None:
                    continue
                yield child.jobs.pop(0), answer
                child.deadline = monotonic() + seconds
                if isinstance(answer, Died) or not child.jobs:
                    _end(child)
                    running.remove(child)
                    if child.jobs:
                        waiting.insert(0, child.jobs)
    finally:
        for child in running:
            _end(child)


def _start(context: Any, work: Callable[[Job], Any], jobs: list[Job], seconds: float) -> _Child:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work, list(jobs)), daemon=True)
    process.start()
    theirs.close()
    return _Child(process, ours, jobs, monotonic() + seconds)


def _serve(pipe: Connection, work: Callable[[Job], Any], jobs: list[Job]) -> None:
    logging.disable(logging.CRITICAL)  # the exporters log every package that is not installed
    gc.freeze()  # exempts half a million imported objects from garbage collection
    for job in jobs:
        pipe.send(work(job))
    pipe.close()


def _answer(child: _Child) -> Any:
    """The child's answer, or None if there is none yet."""
    if child.pipe.poll():
        try:
            return child.pipe.recv()
        except EOFError:
            child.process.join()
            return Died(f"crashed ({child.process.exitcode})")
    return Died("timed out") if monotonic() >= child.deadline else None


def _end(child: _Child) -> None:
    child.process.kill()
    child.process.join()
    child.pipe.close()
