"""The trial process: tries each bundle in a child process with limits, before the server loads it.

It is forked from the server if that has no threads yet, otherwise started as a program. It has no threads itself, so
that it can fork. It ends when its connection closes.
"""

import ctypes
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from unroll import bundle as bundles
from unroll.bundle import BundleError, Content, GoldenMismatch, Verifier
from unroll.bundle.golden import Arrays
from unroll.service.engine.runner import Runner

#: Maximum size of a child's answer.
_MOST_ANSWER = 2**20
#: Limit of a child's wall time, as a factor of its processor time plus a constant: other processes may slow it down.
_WALL, _WALL_SECONDS = 5, 60
_PR_SET_PDEATHSIG = 1
_OUT_OF_MEMORY = ("bad_alloc", "allocate memory", "bad allocation")


@dataclass(frozen=True, slots=True)
class TrialLimits:
    """Limits of a trial, and the calls that it makes.

    Attributes:
        memory: Bytes, beyond those of the process.
        seconds: Processor time.
        allowed_operators: Operators that a graph may have besides those of the allow-list.
        calls: Rows and time steps of the largest calls.
        slack: Factor on the manifest's tolerance for answers on the CPU.
    """

    memory: int = 4 * 2**30
    seconds: float = 30.0
    allowed_operators: tuple[str, ...] = ()
    calls: tuple[tuple[int, int], ...] = ()
    slack: float = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """One bundle to try. sizes: of the manifest, graph and golden vectors that follow, in bytes."""

    path: str
    sizes: list[int]
    limits: TrialLimits

    def head(self) -> bytes:
        content = json.dumps(asdict(self)).encode()
        return len(content).to_bytes(4, "big") + content


def serve(connection: socket.socket) -> None:
    """Try bundles one at a time, and answer each with a line of JSON, until the connection closes."""
    stream = connection.makefile("rb")
    while size := stream.read(4):
        head = json.loads(stream.read(int.from_bytes(size, "big")))
        job = Job(head["path"], head["sizes"], TrialLimits(**head["limits"]))
        parts = [stream.read(size) for size in job.sizes]
        content = Content(Path(job.path), *parts)
        answer = _in_child(lambda job=job, content=content: _try(job, content), job, connection)  # type: ignore[misc]
        connection.sendall(answer + b"\n")


def quiet(connection: socket.socket) -> socket.socket:
    """Detach from the parent's signals, files and locks; keep only the connection."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    for descriptor in (1, 2):
        os.dup2(0, descriptor)
    os.dup2(connection.detach(), 3)
    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return socket.socket(fileno=3)


def _in_child(work: Callable[[], dict[str, Any]], job: Job, connection: socket.socket) -> bytes:
    """Run `work` in a child. Returns its result as JSON, or the reason why the child failed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            connection.close()
            _limit(job)
            answer = json.dumps(work()).encode()
            while answer:
                answer = answer[os.write(writing, answer) :]
        finally:
            os._exit(0)
    os.close(writing)
    try:
        found = _read(reading, connection, monotonic() + _WALL * job.limits.seconds + _WALL_SECONDS)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    why = _why(status, usage.ru_utime + usage.ru_stime, job, in_time=found is not None)
    answer, _, _ = (found or b"").partition(b"\n")  # a compromised child can answer only for its own bundle
    return answer or json.dumps(why).encode()


def _read(reading: int, connection: socket.socket, until: float) -> bytes | None:
    """The child's answer; None if it is late. Exits this process if the server has disconnected."""
    poll, answer = select.poll(), b""
    poll.register(reading, select.POLLIN)
    poll.register(connection, select.POLLHUP)
    while (remaining := until - monotonic()) > 0 and len(answer) <= _MOST_ANSWER:
        for descriptor, _ in poll.poll(remaining * 1000):
            if descriptor != reading:
                raise SystemExit(0)
            if not (part := os.read(reading, 65_536)):
                return answer
            answer += part
    return None


def _why(status: int, seconds: float, job: Job, *, in_time: bool) -> dict[str, Any]:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if not in_time or number == signal.SIGXCPU or (number == signal.SIGKILL and seconds >= job.limits.seconds):
        return {"code": "bundle_time", "message": f"trying it takes more than {job.limits.seconds:g} s"}
    if number == signal.SIGKILL:
        return {"code": "bundle_memory", "message": "the system does not have enough memory to try it"}
    how = signal.Signals(number).name if number else f"status {os.waitstatus_to_exitcode(status)}"
    return {"code": "bundle_crashed", "message": f"it crashed its trial process ({how})"}


def _limit(job: Job) -> None:
    in_use = 0
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with suppress(OSError):  # if memory runs out, the system should kill this process first
            Path("/proc/self/oom_score_adj").write_text("1000")
        with suppress(OSError):
            in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    seconds = ceil(job.limits.seconds)
    for what, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, in_use + job.limits.memory, in_use + job.limits.memory),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_FSIZE, 0, 0),
    ):
        most = resource.getrlimit(what)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(what, (soft, hard))


def _try(job: Job, content: Content) -> dict[str, Any]:
    """Load the bundle as the server would, and make the calls that the server makes before serving."""
    try:
        bundle = bundles.parse(content, job.limits.allowed_operators)
        runner = Runner(bundle.model, bundle.manifest)
        parity = Verifier(runner, bundle.manifest).replay(bundle.golden, job.limits.slack)
        for rows, steps in job.limits.calls:
            _call(runner, bundle.golden.inputs, bundle.golden.state, rows, steps)
        return {"parity": parity}
    except BundleError as error:
        return {"code": error.code, "message": error.message}
    except GoldenMismatch as error:
        return {"code": "bundle_mismatch", "message": str(error)}
    except Exception as error:  # noqa: BLE001 any error refuses the bundle
        text = f"{type(error).__name__}: {error}"[:2000]
        if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
            return {
                "code": "bundle_memory",
                "message": f"trying it takes more than {job.limits.memory} bytes of memory",
            }
        return {"code": "bundle_unusable", "message": text}


def _call(runner: Runner, inputs: Arrays, state: np.ndarray, rows: int, steps: int) -> None:
    resized = {name: np.resize(array[:1], (rows, steps, *array.shape[2:])) for name, array in inputs.items()}
    runner(resized, np.resize(state[:1], (rows, state.shape[1])), np.full(rows, steps, np.int32))


if __name__ == "__main__":
    try:
        serve(quiet(socket.socket(fileno=int(sys.argv[1]))))
    finally:
        os._exit(0)  # the threads of libraries may not end
