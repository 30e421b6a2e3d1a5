"""Runs Python over the stub in a child process: the loader must find the stub before onnxruntime starts."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from stub_cuda import library
from stub_cuda.calls import Calls, read
from waiting import PATIENCE

_PROVIDER = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"


@dataclass(frozen=True, slots=True)
class Outcome:
    """result: The last line that the script prints, parsed as JSON; None if it prints nothing."""

    result: Any
    phases: dict[str, Calls]


class Stub:
    """Builds the stub library in a folder. `missing()` returns why it cannot be built."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs = 0
        library.build(_PROVIDER, folder)

    @staticmethod
    def missing() -> str | None:
        return library.missing() if _PROVIDER.exists() else "needs onnxruntime-gpu"

    def run(self, script: str, *arguments: object) -> Outcome:
        """Run a script with `arguments` as its sys.argv[1:]. Raises if the script fails."""
        self._runs += 1
        log = self._folder / f"log{self._runs}"
        log.touch()
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(self._folder),
            "STUB_CUDA_LOG": str(log),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode:
            raise AssertionError(f"the script ended with {done.returncode}:\n{done.stderr}")
        printed = done.stdout.splitlines()
        return Outcome(json.loads(printed[-1]) if printed else None, read(log.read_text()))
