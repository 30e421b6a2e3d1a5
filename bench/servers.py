"""Server processes: starts them on their cores, waits until they are ready, observes them, and always ends them."""

import os
import signal
import socket
import subprocess
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from time import monotonic, sleep

HOST = "127.0.0.1"
ROOT = Path(__file__).parents[1]
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0


class ServerFailed(Exception):
    """A server did not start or ended early. The message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server; `start_seconds` is the time from process start to ready."""

    port: int
    process: "subprocess.Popen[bytes]"
    start_seconds: float

    def resident_bytes(self) -> int:
        """VmRSS, summed over its processes."""
        return sum(_resident_bytes(pid) for pid in _session_members(self.process.pid))

    def cpu_seconds(self) -> float:
        """Processor time used so far, summed over its processes."""
        return sum(_ticks(pid) for pid in _session_members(self.process.pid)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Restrict this thread, and every process it starts inside the block, to these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def running_server(
    command: Sequence[str],
    cores: Collection[int],
    log: Path,
    ready_path: str | None = None,
) -> Iterator[Server]:
    """A ready server on a free port; it ends with the block.

    Args:
        command: the command line; the word `PORT` is replaced by the port.
        cores: the server's cores.
        log: the file for its output.
        ready_path: answers with 200 once the server is ready; None if it is ready once it listens.
    """
    port = _free_port()
    process: subprocess.Popen[bytes] | None = None
    try:
        with log.open("wb") as output, on_cores(cores):
            started = monotonic()
            process = subprocess.Popen(
                [str(port) if word == "PORT" else word for word in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,  # Ctrl-C reaches only this process, which ends the session
            )
        _wait_until_ready(process, port, ready_path, log)
        start_seconds = monotonic() - started
        _pin_threads(process.pid, cores)
        yield Server(port, process, start_seconds)
        if process.poll() is not None:
            raise _failed(process, log)
    finally:
        if process is not None:
            _end(process)


@contextmanager
def suspended(servers: Iterable[Server]) -> Iterator[None]:
    """Suspend servers within the block, because some are never idle."""
    processes = [pid for server in servers for pid in _session_members(server.process.pid)]
    try:
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int, path: str | None, log: Path) -> None:
    give_up = monotonic() + _START_SECONDS
    while process.poll() is None and monotonic() < give_up:
        if _is_ready(port, path):
            return
        sleep(0.005)
    raise _failed(process, log)


def _is_ready(port: int, path: str | None) -> bool:
    connection = HTTPConnection(HOST, port, timeout=1.0)
    try:
        connection.connect()
        if path is None:
            return True
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _failed(process: "subprocess.Popen[bytes]", log: Path) -> ServerFailed:
    output = log.read_text(errors="replace")[-2000:]
    return ServerFailed(f"exit status {process.poll()} of: {' '.join(map(str, process.args))}\n{output}")  # type: ignore[arg-type]


def _session_members(leader: int) -> list[int]:
    """Processes of a server's session, and their descendants in other sessions."""
    parents: dict[int, int] = {}
    members: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, parent, _, session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
                    if int(session) == leader:
                        members.add(int(entry.name))
    while children := {pid for pid, parent in parents.items() if parent in members and pid not in members}:
        members |= children
    return sorted(members)


def _ticks(pid: int) -> int:
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0


def _resident_bytes(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def _pin_threads(leader: int, cores: Collection[int]) -> None:
    """Pin every thread again: a library may have spread its threads over all cores."""
    for pid in _session_members(leader):
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with suppress(OSError):
                    os.sched_setaffinity(int(thread), cores)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to the process group, then SIGKILL. An interrupt only brings the SIGKILL forward."""
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    finally:
        for pid in _session_members(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
