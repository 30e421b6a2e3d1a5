"""`unroll serve` as a process of its own."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from waiting import PATIENCE

ROOT = Path(__file__).parents[3]


def launch(*arguments: str, program: Sequence[str] = ("-m", "unroll", "serve")) -> subprocess.Popen[str]:
    command = [sys.executable, *program, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class Process:
    """A server as its own process. `log`: its lines on stderr, each a JSON document."""

    def __init__(self, repository: Path, *flags: str, **options: Sequence[str]) -> None:
        self.popen = launch("--repository", str(repository), "--port", "0", "--device", "cpu", *flags, **options)
        self.log: list[dict] = []
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.log.append(json.loads(line))
            if found := re.search(r"running on (http://\S+:\d+)", self.log[-1]["event"]):
                self.url = found.group(1)
                return
        raise AssertionError(f"the server did not start: {self.log}")

    def end(self) -> int:
        """Exit status, after the rest of the log was read."""
        _, rest = self.popen.communicate(timeout=PATIENCE)
        self.log += [json.loads(line) for line in rest.splitlines()]
        return self.popen.returncode


#: The fixture `start_process`: flags, and `program=…`.
StartProcess = Callable[..., Process]
