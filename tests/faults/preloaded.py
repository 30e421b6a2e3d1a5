"""Forks `unroll serve` from a process that has already imported it, because imports dominate its start time."""

import atexit
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from waiting import PATIENCE, until

ROOT = Path(__file__).parents[2]

_PR_SET_CHILD_SUBREAPER = 36


class Served:
    """A running `unroll serve` with the interface of subprocess.Popen, a child of this process in its folder.

    script: Python code to run instead, as with `python -c`.
    """

    def __init__(self, arguments: Sequence[str], log: int, environment: Mapping[str, str], script: str = "") -> None:
        link = _preloaded()
        request = json.dumps([arguments, dict(environment), os.getcwd(), script]).encode()
        socket.send_fds(link, [request], [log])
        self.pid = int(link.recv(64))
        assert link.recv(64) == b"orphaned"
        self._status: int | None = None
        self._polling = threading.Lock()

    def poll(self) -> int | None:
        with self._polling:
            if self._status is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._status = os.waitstatus_to_exitcode(status) if pid else None
            return self._status

    def wait(self) -> int:
        until(lambda: self.poll() is not None, f"the end of process {self.pid}")
        assert self._status is not None
        return self._status

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


@cache
def _preloaded() -> socket.socket:
    """Return the socket to the process that forks servers. That process ends with this one."""
    # Servers are orphaned at once and become children of this process.
    assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-P", Path(__file__).with_name("fork_servers.py"), str(theirs.fileno())]
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    ours.settimeout(PATIENCE)
    atexit.register(process.wait)
    atexit.register(ours.close)  # runs before the wait, and ends the process
    return ours
