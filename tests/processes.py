"""`unroll serve` as a separate process."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from faults.preloaded import Served
from waiting import PATIENCE

ROOT = Path(__file__).parents[1]


class Launched(Served):
    """`unroll serve`, or a script that calls it. It starts quickly: it is forked from a process that has imported it.

    stderr: A pipe with its stdout and stderr.
    """

    def __init__(self, *arguments: str, script: str = "") -> None:
        reading, writing = os.pipe()
        try:
            super().__init__(arguments, writing, os.environ, script)
        finally:
            os.close(writing)
        self.stderr = os.fdopen(reading)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """Wait for the exit. Return an empty stdout, and the rest of stderr."""
        with self:
            return "", self.stderr.read()

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stderr.close()
        self.wait()


def spawn(*arguments: str, script: str = "") -> subprocess.Popen[str]:
    """Start the same in a new interpreter, as a user would."""
    program = ["-c", script] if script else ["-m", "unroll", "serve"]
    command = [sys.executable, *program, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class Process:
    """A server as a separate process, started by `Launched` or `spawn`.

    log: The lines of its stderr, each a JSON document.
    """

    def __init__(self, repository: Path, *flags: str, start: Callable[..., Any] = Launched, script: str = "") -> None:
        usual = ("--repository", str(repository), "--port", "0", "--device", "cpu")
        self.popen = start(*usual, *flags, script=script)
        self.log: list[dict] = []
        for line in self.popen.stderr:
            self.log.append(json.loads(line))
            if found := re.search(r"running on (https?://\S+:\d+)", self.log[-1]["event"]):
                self.url = found.group(1)
                return
        raise AssertionError(f"the server did not start: {self.log}")

    def end(self) -> int:
        """Read the rest of the log and return the exit status."""
        _, rest = self.popen.communicate(timeout=PATIENCE)
        self.log += [json.loads(line) for line in rest.splitlines()]
        return self.popen.returncode


#: The type of the fixture `start_process`, called with flags, `start=…` and `script=…`.
StartProcess = Callable[..., Process]
