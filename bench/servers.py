"""Servers as processes of their own: started on their cores, waited for, looked at, and always ended."""

import os
import signal
import socket
import subprocess
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from time import monotonic, sleep

HOST = "127.0.0.1"
ROOT = Path(__file__).parents[1]
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0


#: The leading process of each server that runs, by its port.
_leaders: dict[int, int] = {}


class ServerFailed(Exception):
    """A server did not come up, or ended before it was told to; with the end of what it said."""


@dataclass(frozen=True, slots=True)
class Server:
    """start_seconds: from the start of the process until it was ready."""

    port: int
    process: "subprocess.Popen[bytes]"
    start_seconds: float

    def resident_bytes(self) -> int:
        """VmRSS of all its processes."""
        return sum(_resident_bytes(pid) for pid in _session_members(self.process.pid))

    def cpu_seconds(self) -> float:
        """Computed so far by its leading process."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """This thread, and what it starts meanwhile, runs on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def running(
    command: Sequence[str],
    cores: Collection[int],
    log: Path,
    ready_path: str | None = None,
    *,
    takes_turns: bool = True,
) -> Iterator[Server]:
    """A server that is ready on a port, which replaces `PORT` in the command; ended on the way out.

    ready_path: answered with 200 when it can serve; None: it can once it listens. takes_turns: it stands still while
    another is measured; not what the other needs.
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
                start_new_session=True,  # Ctrl-C is for us; we end the session
            )
        _wait_until_ready(process, port, ready_path, log)
        start_seconds = monotonic() - started
        _pin_threads(process.pid, cores)
        if takes_turns:
            _leaders[port] = process.pid
        yield Server(port, process, start_seconds)
        if process.poll() is not None:
            raise _failed(process, log)
    finally:
        _leaders.pop(port, None)
        if process is not None:
            _end(process)


@contextmanager
def only(*ports: int) -> Iterator[None]:
    """The other servers stand still meanwhile: some of them are never idle."""
    others = [pid for other, leader in _leaders.items() if other not in ports for pid in _session_members(leader)]
    try:
        for pid in others:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in others:
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
    said = log.read_text(errors="replace")[-2000:]
    return ServerFailed(f"exit status {process.poll()} of: {' '.join(map(str, process.args))}\n{said}")  # type: ignore[arg-type]


def _session_members(leader: int) -> list[int]:
    """The processes of a server's session, and those that descend from them and made sessions of their own."""
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


def _resident_bytes(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def _pin_threads(leader: int, cores: Collection[int]) -> None:
    """Libraries may have spread their threads over all cores, whatever the process was told."""
    for pid in _session_members(leader):
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with suppress(OSError):
                    os.sched_setaffinity(int(thread), cores)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask the process group to end, then insist. An interrupt meanwhile only makes it insist sooner."""
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
