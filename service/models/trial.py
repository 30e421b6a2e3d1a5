"""Tries bundles in another process before this process parses them."""

import json
import os
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from signal import SIGKILL

from unroll.bundle import BundleError, Content
from unroll.bundle.verification import Differences
from unroll.service.models import trial_process
from unroll.service.models.trial_process import Job, TrialLimits

#: Maximum number of remembered results, because a repository may change indefinitely.
_MOST_REMEMBERED = 1000
#: A slack that accepts any finite answer.
ANY = 1e300
#: Results that would repeat, and are expensive to obtain.
_COSTLY = {"bundle_memory", "bundle_time", "bundle_crashed"}


class TrialProcess:
    """The trial process, seen from the server."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            if sys.platform == "linux" and threading.active_count() == 1:
                self.pid = _fork(ours, theirs)
                self._wait: Callable[[], object] = partial(os.waitpid, self.pid, 0)
            else:
                command = [sys.executable, "-P", "-m", trial_process.__name__, str(theirs.fileno())]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                started = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
                self.pid, self._wait = started.pid, started.wait
        self._connection, self._answers = ours, ours.makefile("rb")
        self._lock = threading.Lock()

    def ask(self, job: Job, content: Content) -> dict[str, object] | None:
        """Try a bundle. Returns the answer, or None if the process has ended."""
        with self._lock, suppress(OSError, ValueError):
            for part in (job.head(), content.manifest, content.model, content.golden):
                self._connection.sendall(part)
            return json.loads(self._answers.readline())
        return None

    def close(self) -> None:
        """Kill the process. A thread that waits for its answer gets None."""
        with suppress(OSError):
            os.kill(self.pid, SIGKILL)
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with suppress(ChildProcessError):
            self._wait()
        with self._lock:
            self._answers.close()
            self._connection.close()


def _fork(ours: socket.socket, theirs: socket.socket) -> int:
    """Fork the trial process, which costs almost nothing. Possible only while this process has no threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's libraries recreate their threads
        pid = os.fork()
    if not pid:
        try:
            ours.close()
            trial_process.serve(trial_process.quiet(theirs))
        finally:
            os._exit(0)
    return pid


class Trials:
    """Tries bundles one at a time, and remembers the results."""

    def __init__(self, limits: TrialLimits, start: Callable[[], TrialProcess] = TrialProcess) -> None:
        self.limits = limits
        self._start = start
        self._process: TrialProcess | None = None
        self._over = False
        self._remembered: dict[str, Differences | BundleError] = {}

    def prove(self, content: Content, seconds: float | None = None) -> Differences:
        """Return the largest differences from PyTorch on the CPU.

        Args:
            seconds: Processor time for the trial, if less than the limit.

        Raises:
            BundleError: The bundle cannot be served, or its trial exceeds a limit.
        """
        found = self._remembered.get(content.identity) or self._try(content, min(self.limits.seconds, seconds or inf))
        if isinstance(found, BundleError):
            raise found
        return found

    def _try(self, content: Content, seconds: float) -> Differences | BundleError:
        sizes = [len(content.manifest), len(content.model), len(content.golden)]
        path = str(Path(content.path.parent.name, content.path.name))
        job = Job(path, sizes, replace(self.limits, seconds=seconds))
        process = self._process = self._process or self._start()
        if self._over:
            self.close()
        answer = process.ask(job, content)
        if answer is None:
            self.close()
            return BundleError("bundle_crashed", "the trial process has ended")
        if "code" in answer:
            error = BundleError(str(answer["code"]), str(answer["message"]))
            if error.code in _COSTLY and seconds == self.limits.seconds:
                self._remember(content, error)
            return error
        parity: Differences = answer["parity"]  # type: ignore[assignment]
        self._remember(content, parity)
        return parity

    def _remember(self, content: Content, found: Differences | BundleError) -> None:
        if len(self._remembered) >= _MOST_REMEMBERED:
            self._remembered.clear()
        self._remembered[content.identity] = found

    def close(self, *, for_good: bool = False) -> None:
        """Kill the process, even during a trial. The next trial starts another, unless `for_good`."""
        self._over |= for_good
        process, self._process = self._process, None
        if process is not None:
            process.close()
