"""What a store is, and what its sessions survive, in words for the log and for `unroll doctor`."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio.cluster import RedisCluster
from redis.exceptions import RedisError

from unroll.service.core.errors import StoreUnavailable
from unroll.service.store.embedded_store import EmbeddedStoreConfig
from unroll.service.store.exchanges import unavailable
from unroll.service.store.opening import StoreConfig
from unroll.service.store.redis_client import FAILURES, connect, disconnect

_FOLDER = {
    "always": "the end of any process, and a crash of the machine",
    "everysec": "the end of any process, and a crash of the machine but for the last second",
    "never": "the end of any process, but not a crash of the machine",
}
_FSYNC = {
    "always": "the end of any server, and a crash of Redis",
    "everysec": "the end of any server, and a crash of Redis but for the last second",
    "no": "the end of any server, and a crash of Redis but for what its machine has not yet written to the disk",
}
_UNKNOWN = "the end of any server; Redis does not say what a crash of its own leaves"
_ASKED = ("appendonly", "appendfsync", "save", "maxmemory", "maxmemory-policy")


@dataclass(frozen=True, slots=True)
class Description:
    """A store.

    Attributes:
        kind: The program or library, with its version.
        where: Its place, without user and password.
        settings: Of Redis: those that decide what is kept, so far as it says them.
    """

    kind: str
    where: str
    survives: str
    settings: dict[str, str] = field(default_factory=dict)


async def describe(config: StoreConfig) -> Description:
    """Ask a store what it is. A folder need not be opened for that.

    Raises:
        StoreUnavailable: It does not answer.
        StoreRefused: Its URL is wrong.
    """
    if isinstance(config, EmbeddedStoreConfig):
        return Description("LMDB", place(config), _FOLDER[config.sync])
    client = connect(config.url, config.timeout)
    try:
        async with asyncio.timeout(config.timeout):
            return await _describe_redis(client, place(config))
    except FAILURES as error:
        raise unavailable(error) from error
    finally:
        await disconnect(client)


def place(config: StoreConfig) -> str:
    """Where the store is, without user, password and options."""
    if isinstance(config, EmbeddedStoreConfig):
        return f"the folder {config.folder}"
    parts = urlsplit(config.url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


async def _describe_redis(client: Any, where: str) -> Description:
    node = {}
    if isinstance(client, RedisCluster):
        await client.initialize()
        node = {"target_nodes": client.get_primaries()[0]}
    server, persistence, memory = [await client.info(part, **node) for part in ("server", "persistence", "memory")]
    settings = {
        "appendonly": "yes" if persistence.get("aof_enabled") else "no",
        "maxmemory": str(memory.get("maxmemory", "")),
        "maxmemory-policy": str(memory.get("maxmemory_policy", "")),
    }
    try:
        for name in _ASKED:
            settings |= await client.config_get(name, **node)
    except RedisError:
        pass  # the user may not ask, or the provider has renamed the command
    valkey = server.get("valkey_version")
    kind = f"Valkey {valkey}" if valkey else f"Redis {server.get('redis_version', 'of unknown version')}"
    return Description(kind, where, _survives(settings), settings)


def _survives(settings: dict[str, str]) -> str:
    if settings["appendonly"] == "yes":
        return _FSYNC.get(settings.get("appendfsync", ""), _UNKNOWN)
    if (snapshots := settings.get("save")) is None:
        return _UNKNOWN
    if snapshots:
        return f"the end of any server; a crash of Redis leaves its last snapshot (save {snapshots})"
    return "the end of any server, but not a restart of Redis: it has no file (appendonly no, no save)"


async def where_sessions_are(config: StoreConfig | None, state_file: Path | None) -> dict[str, str]:
    """What the log says at the start: where sessions are kept, and what they survive."""
    if config is None:
        survive = f"an orderly end of the server, in {state_file}" if state_file else "nothing; --store keeps them"
        return {"where": "memory", "survive": survive}
    try:
        found = await describe(config)
    except StoreUnavailable as error:
        return {"where": place(config), "survive": f"unknown: {error.message}"}
    return {"where": f"{found.where} ({found.kind})", "survive": found.survives}
