"""Runs `trial.py` in its own process: onnxruntime may be missing, and a broken driver may kill the process."""

import json
import re
import signal
import subprocess
import sys
from typing import Any

from unroll.service.doctor.facts import Runtime

#: Not imported: it imports onnxruntime.
_TRIAL = "unroll.service.doctor.trial"
#: CUDA takes a while to start where there are many GPUs.
_SECONDS = 120.0
_LOGGED_ERROR = re.compile(r"\[E:onnxruntime[^\]]*\] (.*\S)")


class TrialFailed(Exception):
    """The trial gave no result; the message says why, in one line."""


def runtime() -> Runtime:
    """Describe the installed onnxruntime. Raises TrialFailed if it cannot be imported."""
    answer, _ = _run()
    return Runtime(**{**answer, "providers": tuple(answer["providers"]), "auto": tuple(answer["auto"])})


def session(device: str) -> str | None:
    """Load a model on `cpu` or `cuda:N`. Returns the problem, or None."""
    try:
        answer, log = _run(device)
    except TrialFailed as failure:
        return str(failure)
    # If onnxruntime cannot use a provider, it only logs the reason and uses another one.
    problem, logged = answer["problem"], _LOGGED_ERROR.search(log)
    if problem and logged and logged[1] not in problem:
        return f"{problem}; onnxruntime logged: {logged[1]}"
    return problem


def _run(*arguments: str) -> tuple[dict[str, Any], str]:
    try:
        ran = subprocess.run(_command(*arguments), capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise TrialFailed(f"no result within {_SECONDS:.0f} seconds") from None
    if ran.returncode < 0:
        raise TrialFailed(f"the process was killed: {signal.strsignal(-ran.returncode)} (signal {-ran.returncode})")
    if ran.returncode:
        raise TrialFailed((ran.stderr.strip() or f"exit status {ran.returncode}").splitlines()[-1])
    return json.loads(ran.stdout.splitlines()[-1]), ran.stderr


def _command(*arguments: str) -> list[str]:
    # -P: modules in the current directory must not shadow ours.
    return [sys.executable, "-P", "-m", _TRIAL, *arguments]
