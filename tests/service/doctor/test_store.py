"""`unroll doctor --store`: a folder and a Redis, healthy and misconfigured."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis_server import RedisServer

from unroll import cli
from unroll.service.doctor import ask
from unroll.service.doctor.facts import Runtime
from unroll.service.store.lmdb_folder import LmdbFolder


@pytest.fixture(autouse=True)
def no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """A working device, without a child process."""
    monkeypatch.setattr(ask, "runtime", lambda: Runtime("1", "", ("CPUExecutionProvider",), ("cpu",), "no GPU"))
    monkeypatch.setattr(ask, "session", lambda device: None)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


def examined(capsys: pytest.CaptureFixture[str], store: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the exit status and the findings by name."""
    status = cli.main(["doctor", "--device", "cpu", "--json", "--store", store])
    return status, {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}


def test_a_redis(redis: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = examined(capsys, redis.url)
    assert status == 0
    assert "Redis" in found["store"]["says"] or "Valkey" in found["store"]["says"]
    assert found["persistence"]["says"] == "appendonly yes, appendfsync everysec, save off"
    assert (found["eviction"]["status"], found["commits"]["status"]) == ("ok", "ok")
    assert "median of 20" in found["commits"]["says"]
    assert all(redis.client.pttl(key) > 0 for key in redis.client.scan_iter()), "nothing stays"


def test_a_redis_that_loses_sessions(redis: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    redis.client.config_set("appendonly", "no")
    redis.client.config_set("maxmemory-policy", "allkeys-lru")
    redis.client.config_set("maxmemory", str(2**30))
    status, found = examined(capsys, redis.url)
    assert status == 0
    assert "appendonly yes" in found["persistence"]["mend"]
    assert "open sessions are lost" in found["eviction"]["says"]
    assert "noeviction" in found["eviction"]["mend"]


def test_a_store_that_does_not_answer_or_takes_no_writes_is_broken(
    redis: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert examined(capsys, "redis://127.0.0.1:1/0")[0] == 1
    redis.client.execute_command("ACL", "SETUSER", "me", "on", ">secret", "~*", "+@all", "-set")
    status, found = examined(capsys, redis.url.replace("://", "://me:secret@"))
    assert (status, found["store"]["status"]) == (1, "broken")
    assert "its user needs" in found["store"]["says"]


def test_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = examined(capsys, f"file://{tmp_path}/new")
    assert (status, found["sessions"]["says"]) == (0, "no store in the folder yet")
    assert not (tmp_path / "new").exists(), "the doctor changes nothing"
    opened = LmdbFolder(tmp_path / "old", "always")
    opened.write(lambda transaction: transaction.put(b"lstm/a", b"?"))
    opened.close()
    status, found = examined(capsys, f"file://{tmp_path}/old")
    assert status == 1
    assert "1 damaged" in found["sessions"]["says"]
    assert "--store-sync always" in found["sessions"]["says"]
    assert "GiB free" in found["disk"]["says"]
    assert found["commits"]["status"] == "ok"
