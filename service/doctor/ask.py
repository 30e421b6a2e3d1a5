"""Asks `trial.py`, in a process of its own: onnxruntime may be missing, and a broken driver may end a process."""

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
    """Why there is no answer, in a line."""


def runtime() -> Runtime:
    """Raises TrialFailed if onnxruntime cannot be imported."""
    answer, _ = _run()
    return Runtime(**{**answer, "providers": tuple(answer["providers"]), "auto": tuple(answer["auto"])})


def session(device: str) -> str | None:
    """What goes wrong when a model is loaded on `cpu` or `cuda:N`, or None."""
    try:
        answer, log = _run(device)
    except TrialFailed as failure:
        return str(failure)
    # Why a provider could not be used is in no exception: onnxruntime logs it, and takes another.
    problem, logged = answer["problem"], _LOGGED_ERROR.search(log)
    if problem and logged and logged[1] not in problem:
        return f"{problem}; it says: {logged[1]}"
    return problem


def _run(*arguments: str) -> tuple[dict[str, Any], str]:
    """The answer, and what was logged."""
    try:
        ran = subprocess.run(_command(*arguments), capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise TrialFailed(f"no answer within {_SECONDS:.0f} seconds") from None
    if ran.returncode < 0:
        raise TrialFailed(f"the process was ended: {signal.strsignal(-ran.returncode)} (signal {-ran.returncode})")
    if ran.returncode:
        raise TrialFailed((ran.stderr.strip() or f"exit status {ran.returncode}").splitlines()[-1])
    return json.loads(ran.stdout.splitlines()[-1]), ran.stderr


def _command(*arguments: str) -> list[str]:
    # -P: a folder called `service` where the user happens to be is not ours.
    return [sys.executable, "-P", "-m", _TRIAL, *arguments]
