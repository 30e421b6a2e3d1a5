"""Processor time of a step by layer: the real server under load, sampled by py-spy.

The server has one core, the load generator another. Shares are relative to the samples in which the server was busy,
and are scaled to microseconds by the processor time of a step in a run without py-spy. py-spy shares the server's core
and does not stop it, so no part of a batch is sampled more often than another.

With --native py-spy also sees functions of the kernel and of libraries, but stops the server for milliseconds. The
samples then cluster at the same moments of a turn: they show which functions cost, not how much.
"""

import argparse
import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import inputs
from bench.load import Client, Load, Measurement
from bench.reference import Reference, export
from bench.servers import Server, ServerFailed, on_cores, running_server
from bench.subjects import Launch, Subject, WrongAnswer, infer_steps, json_steps, raw_steps, stream_steps, unroll

#: py-spy reads symbols before its first sample.
_PY_SPY_STARTS_SECONDS = 3.0
_SAMPLES_PER_SECOND, _NATIVE_SAMPLES_PER_SECOND = 197, 29

IDLE, OTHER = "idle", "other"

#: The layer of a sample is that of the innermost matching frame, so the time of the interpreter, of NumPy and of the C
#: library counts for the layer that called them.
LAYERS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (IDLE, re.compile(r"^(epoll_p?wait2?|select|poll) |SimpleQueue_get|^_worker \(concurrent/")),
    (
        "kernel: sockets",
        re.compile(r"^(__)?(libc_)?(write|writev|send|sendto|sendmsg|read|recv|recvfrom|accept4?) \(lib"),
    ),
    ("HTTP parser", re.compile(r"httptools/|\(parser\.c|llhttp|\((api|http)\.c")),
    ("onnxruntime", re.compile(r"onnxruntime")),
    ("transport", re.compile(r"service/transport/|uvicorn/|websockets/")),
    ("api", re.compile(r"service/(api|app)|fastapi/|starlette/")),
    ("protocol", re.compile(r"service/protocol/|orjson")),
    ("models", re.compile(r"service/models/")),
    ("sessions", re.compile(r"service/sessions/")),
    ("scheduler", re.compile(r"service/scheduler/")),
    ("engine", re.compile(r"service/(engine|state)/")),
    ("store", re.compile(r"service/store/")),
    ("telemetry", re.compile(r"service/telemetry/")),
    ("event loop", re.compile(r"uvloop|\(loop\.c|libuv|^uv_|_asynciomodule\.c|asyncio/")),
)

#: A server that any process of the same user may trace; many kernels allow only the parent.
_TRACEABLE = (
    "import ctypes, runpy, sys; ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0); "
    "sys.argv[0] = 'unroll'; runpy.run_module('unroll', run_name='__main__')"
)


class BudgetFailed(Exception):
    """The measurement failed. The message has the reason."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run: steps per second, the server's processor time per step, and the part of it in the kernel."""

    steps: float
    cpu_seconds: float
    kernel_seconds: float = 0.0


def layer_of(frames: Sequence[str]) -> tuple[str, str]:
    """The layer of a sample, and the frame that matched. frames: outermost first, each `function (file)`."""
    for frame in reversed(frames):
        for name, pattern in LAYERS:
            if pattern.search(frame):
                return name, frame
    return OTHER, frames[-1]


def fold(raw: Iterable[str]) -> Counter[tuple[str, str]]:
    """Busy samples by layer and frame. raw: py-spy's lines, `frame;frame;frame samples`."""
    folded: Counter[tuple[str, str]] = Counter()
    for line in raw:
        stack, _, samples = line.rpartition(" ")
        where = layer_of(stack.split(";"))
        if samples.isdigit() and where[0] != IDLE:
            folded[where] += int(samples)
    return folded


def table(folded: Counter[tuple[str, str]], run: Run, functions: int = 0) -> str:
    """Microseconds of processor time per step by layer, each with its `functions` most expensive functions."""
    total = folded.total()
    layers: Counter[str] = Counter()
    for (name, _), samples in folded.items():
        layers[name] += samples

    def row(name: str, samples: int) -> str:
        share = samples / total if total else 0.0
        return f"{name:<58}{share * run.cpu_seconds * 1e6:>9.2f}{share:>8.1%}{samples:>9,}"

    lines = [f"{'':<58}{'µs/step':>9}{'share':>8}{'samples':>9}"]
    for name, samples in layers.most_common():
        lines.append(row(name, samples))
        within = Counter({frame: count for (own, frame), count in folded.items() if own == name})
        lines += [row(f"    {frame[:52]}", count) for frame, count in within.most_common(functions)]
    return "\n".join([*lines, row("together", total)])


# ── the server under load ────────────────────────────────────────────────────────────────────────

_SUBJECTS: dict[str, Callable[[Launch, Reference], Subject]] = {
    "raw": raw_steps,
    "json": json_steps,
    "infer": infer_steps,
    "stream": stream_steps,
    "stream-256": partial(stream_steps, entries=256),
}


def _drive(server: Server, subject: Subject, clients: Sequence[Client], seconds: float) -> Run:
    """Each client sends its next request when it is answered; the last answers must be right."""

    async def drive() -> Measurement:
        async with Load(server.port, clients) as load:
            return await load.run(seconds)

    def totals() -> tuple[int, float, float]:
        return sum(client.answered for client in clients), *_cpu_seconds(server.process.pid)

    before = totals()
    measured = asyncio.run(drive())
    answered, user, kernel = (after - then for after, then in zip(totals(), before, strict=True))
    if measured.errors:
        raise BudgetFailed(f"{measured.errors} replies were errors, first {measured.first_error}")
    for client in clients:
        subject.check(client)
    steps = answered * clients[0].weight
    return Run(measured.rate, (user + kernel) / steps, kernel / steps)


def _cpu_seconds(pid: int) -> tuple[float, float]:
    """User and kernel seconds of a process so far."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    tick = 1 / os.sysconf("SC_CLK_TCK")
    return int(after_name[11]) * tick, int(after_name[12]) * tick


# ── py-spy ───────────────────────────────────────────────────────────────────────────────────────


def _py_spy() -> str:
    in_venv = Path(sys.executable).with_name("py-spy")
    found = str(in_venv) if in_venv.is_file() else shutil.which("py-spy")
    if found is None:
        raise BudgetFailed("py-spy is not installed: pip install py-spy")
    return found


def _record(drive: Callable[[float], Run], pid: int, arguments: argparse.Namespace, kind: str, target: Path) -> None:
    """Record the server under load with py-spy, to `target`. kind: py-spy's format. Raises BudgetFailed."""
    rate = _NATIVE_SAMPLES_PER_SECOND if arguments.native else _SAMPLES_PER_SECOND
    words = ["--pid", str(pid), "--duration", str(round(arguments.seconds)), "--rate", str(rate), "--format", kind]
    words += [
        "--function",
        "--output",
        str(target),
        *(["--native", "--idle"] if arguments.native else ["--nonblocking"]),
    ]
    cores = os.sched_getaffinity(0) if arguments.native else os.sched_getaffinity(pid)
    with tempfile.TemporaryFile() as output:
        with on_cores(cores):
            spy = subprocess.Popen(
                [_py_spy(), "record", *words], stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            drive(arguments.seconds + _PY_SPY_STARTS_SECONDS)
            status = spy.wait(arguments.seconds + 60)
        except subprocess.TimeoutExpired as error:
            raise BudgetFailed("py-spy does not end") from error
        finally:
            spy.kill()
            spy.wait()
        output.seek(0)
        if status or not target.is_file():
            why = output.read().decode(errors="replace")[-2000:]
            raise BudgetFailed(f"py-spy could not look into the server (it needs the right to trace it):\n{why}")


def measure(arguments: argparse.Namespace, folder: Path, cores: Sequence[int]) -> tuple[Counter[tuple[str, str]], Run]:
    """Samples by layer and frame, and the run without py-spy."""
    repository, model = folder / "repository", arguments.model
    export(repository)
    reference = Reference(model, repository)
    launch = unroll(repository, *arguments.serve.split())
    subject = _SUBJECTS[arguments.over](launch, reference)
    python, _, _, *words = launch.command(folder)  # python -m unroll ...
    command = (python, "-c", _TRACEABLE, *words)
    with running_server(command, cores[:1], folder / "server.log", launch.ready_path) as server:
        clients = [subject.client(n) for n in range(arguments.clients)]
        drive = partial(_drive, server, subject, clients)
        run = drive(arguments.seconds)
        raw = folder / "samples"
        _record(drive, server.process.pid, arguments, "raw", raw)
        if arguments.flamegraph:
            _record(drive, server.process.pid, arguments, "flamegraph", arguments.flamegraph)
        return fold(raw.read_text(errors="replace").splitlines()), run


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    cores = sorted(os.sched_getaffinity(0))
    try:
        _py_spy()
        with tempfile.TemporaryDirectory(prefix="budget-") as folder, on_cores(cores[-1:]):
            folded, run = measure(arguments, Path(folder), cores)
    except (BudgetFailed, ServerFailed, WrongAnswer, ConnectionError, TimeoutError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the server is stopped", file=sys.stderr)
        return 130
    print(
        f"{arguments.model}, {arguments.clients} clients, {arguments.over}: {run.steps:,.0f} steps/s, "
        f"{1e6 / run.steps:.1f} µs a step; the server computed {run.cpu_seconds * 1e6:.1f} µs of them, "
        f"{run.kernel_seconds * 1e6:.1f} µs in the kernel"
    )
    print(table(folded, run, arguments.functions))
    if len(cores) == 1:
        print("Note: only one core: server, load generator and py-spy share it")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.internals.budget", description=__doc__)
    parser.add_argument("--model", choices=list(inputs.MODELS), default="small")
    parser.add_argument("--over", choices=list(_SUBJECTS), default="raw", help="protocol of the clients")
    parser.add_argument("--serve", default="", metavar="OPTIONS", help='of the server, such as "--store file:///tmp/s"')
    parser.add_argument("--clients", type=int, default=64, help="concurrent clients, at most 1024")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each run, 1 to 120")
    parser.add_argument(
        "--functions", type=int, default=0, metavar="N", help="also list each layer's N most expensive functions"
    )
    parser.add_argument("--native", action="store_true", help="also show functions of the kernel and of libraries")
    parser.add_argument("--flamegraph", type=Path, metavar="FILE", help="write a flame graph (SVG) of a second run")
    arguments = parser.parse_args(argv)
    most = 16 if arguments.over == "stream-256" else 1024
    if not (1 <= arguments.seconds <= 120 and 0 < arguments.clients <= most):
        parser.error("out of bounds, see --help")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
