"""Virtual environments of the peers, created once below .bench/venvs. Peers with the same requirements share one.

pip runs with the machine's own configuration. An environment is complete once its list of requirements is written.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

VENVS = Path(__file__).parents[1] / ".bench" / "venvs"
_REQUIREMENTS = "requirements.txt"
_VENV_SECONDS, _PIP_SECONDS = 120, 900


class EnvironmentFailed(Exception):
    """An environment could not be created. The message has the end of pip's output."""


def existing(name: str, requirements: Sequence[str]) -> Path | None:
    """The interpreter with these requirements: the current one if there are none; None if it does not exist yet."""
    if not requirements:
        return Path(sys.executable)
    listed = _listed(requirements)
    for folder in (VENVS / name, *sorted(VENVS.glob("*"))):
        file = folder / _REQUIREMENTS
        if file.is_file() and file.read_text() == listed:
            return _python(folder)
    return None


def ensure(name: str, requirements: Sequence[str]) -> Path:
    """As `existing`, but create the environment if it is missing or outdated. Raises EnvironmentFailed."""
    if python := existing(name, requirements):
        return python
    folder = VENVS / name
    if folder.exists():
        shutil.rmtree(folder)
    _run([sys.executable, "-m", "venv", str(folder)], _VENV_SECONDS)
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
    _run([str(_python(folder)), "-m", "pip", "install", *quiet, *requirements], _PIP_SECONDS)
    (folder / _REQUIREMENTS).write_text(_listed(requirements))
    return _python(folder)


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _listed(requirements: Sequence[str]) -> str:
    return "".join(f"{requirement}\n" for requirement in requirements)


def _run(command: Sequence[str], seconds: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFailed(f"not done within {seconds:g} s: {' '.join(command)}") from error
    if done.returncode:
        raise EnvironmentFailed(f"exit status {done.returncode} of: {' '.join(command)}\n{done.stderr[-2000:]}")
