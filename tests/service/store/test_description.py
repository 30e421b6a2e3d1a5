"""The server's description of its store at the start: where sessions are kept, and which failures they survive."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis_server import RedisServer
from waiting import PATIENCE

from unroll.service.store.description import describe, where_sessions_are
from unroll.service.store.embedded_store import EmbeddedStoreConfig
from unroll.service.store.redis_store import RedisStoreConfig


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis with a user `me`, password `secret`, without permission to read the configuration."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    server.client.execute_command("ACL", "SETUSER", "me", "on", ">secret", "~*", "+@all", "-config")
    yield server
    server.kill()


@pytest.mark.parametrize(
    ("settings", "survives"),
    [
        ({"appendfsync": "always"}, "a crash of Redis"),
        ({"appendfsync": "everysec"}, "except for the last second"),
        ({"appendfsync": "no"}, "has not yet written to disk"),
        ({"appendonly": "no", "save": "3600 1"}, "a crash of Redis leaves its last snapshot (save 3600 1)"),
        ({"appendonly": "no", "save": ""}, "not a restart of Redis: it has no file"),
    ],
)
async def test_redis_reports_its_persistence(redis: RedisServer, settings: dict[str, str], survives: str) -> None:
    for name, value in {"appendonly": "yes", "save": "", **settings}.items():
        redis.client.config_set(name, value)
    found = await describe(RedisStoreConfig(redis.url, timeout=5.0))
    assert survives in found.survives
    assert found.settings.items() >= settings.items()


async def test_silent_or_restricted_redis_does_not_prevent_the_start(redis: RedisServer) -> None:
    redis.client.config_set("appendonly", "yes")
    url = redis.url.replace("://", "://me:secret@")
    said = await where_sessions_are(RedisStoreConfig(url, timeout=5.0), None)
    assert "does not report" in said["survive"]
    down = await where_sessions_are(RedisStoreConfig("redis://me:secret@127.0.0.1:1/0", timeout=5.0), None)
    assert down["where"] == "redis://127.0.0.1:1/0"
    assert "unknown: " in down["survive"]
    assert "secret" not in f"{said}{down}"


async def test_folder_and_memory_report_the_failures_they_survive(tmp_path: Path) -> None:
    folder = await where_sessions_are(EmbeddedStoreConfig(tmp_path, "never"), None)
    assert folder == {
        "where": f"the folder {tmp_path} (LMDB)",
        "survive": "the end of any process, but not a crash of the machine",
    }
    memory = await where_sessions_are(None, tmp_path / "file")
    assert memory == {"where": "memory", "survive": f"an orderly shutdown, in {tmp_path}/file"}


def test_server_without_a_redis_does_not_import_its_client(tmp_path: Path) -> None:
    source = (
        "import sys; from unroll.service import serve; from unroll.service.settings import Settings\n"
        "from unroll.service.store.opening import open_store\n"
        f"open_store(Settings(repository='.', store={tmp_path.as_uri()!r}).store_config())\n"
        "assert 'lmdb' in sys.modules and 'redis' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr
