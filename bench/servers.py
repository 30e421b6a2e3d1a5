"""Servers as processes of their own: started on one core, waited for, and always ended."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

HOST = "127.0.0.1"
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0


class ServerFailed(Exception):
    """A server did not come up, or ended before it was told to; with the end of what it said."""


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """This thread, and what it starts meanwhile, runs on that core only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def running(command: Sequence[str], core: int, log: Path) -> Iterator[int]:
    """A server that is ready on the port it yields, which replaces `PORT` in the command; ended on the way out."""
    port = _free_port()
    process: subprocess.Popen[bytes] | None = None
    try:
        with log.open("wb") as output, on_core(core):
            process = subprocess.Popen(
                [str(port) if word == "PORT" else word for word in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; we end the group
            )
        _wait_until_ready(process, port, log)
        _pin_threads(process.pid, core)
        yield port
        if process.poll() is not None:
            raise _failed(process, log)
    finally:
        if process is not None:
            _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """All of them listen only when they can answer."""
    give_up = monotonic() + _START_SECONDS
    while process.poll() is None and monotonic() < give_up:
        with suppress(OSError):
            socket.create_connection((HOST, port), timeout=1.0).close()
            return
        sleep(0.02)
    raise _failed(process, log)


def _failed(process: subprocess.Popen[bytes], log: Path) -> ServerFailed:
    said = log.read_text(errors="replace")[-2000:]
    return ServerFailed(f"exit status {process.poll()} of: {' '.join(map(str, process.args))}\n{said}")  # type: ignore[arg-type]


def _pin_threads(pid: int, core: int) -> None:
    """Libraries may have spread their threads over all cores, whatever the process was told."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), {core})


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the process group to end, then insist. An interrupt meanwhile only makes it insist sooner."""
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
