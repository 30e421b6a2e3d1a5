"""Describes a Redis and which failures its sessions survive, as far as it reports them."""

import asyncio
from typing import Any

from redis.asyncio.cluster import RedisCluster
from redis.exceptions import RedisError

from unroll.service.store.description import Description
from unroll.service.store.exchanges import unavailable
from unroll.service.store.redis_client import FAILURES, connect, disconnect
from unroll.service.store.redis_store import RedisStoreConfig

_FSYNC = {
    "always": "the end of any server, and a crash of Redis",
    "everysec": "the end of any server, and a crash of Redis except for the last second",
    "no": "the end of any server, and a crash of Redis except for data that its machine has not yet written to disk",
}
_UNKNOWN = "the end of any server; Redis does not report what survives its own crash"
_ASKED = ("appendonly", "appendfsync", "save", "maxmemory", "maxmemory-policy")


async def describe_redis(config: RedisStoreConfig, where: str) -> Description:
    """Raises the errors of `describe`."""
    client = connect(config.url, config.timeout)
    try:
        async with asyncio.timeout(config.timeout):
            return await _describe(client, where)
    except FAILURES as error:
        raise unavailable(error) from error
    finally:
        await disconnect(client)


async def _describe(client: Any, where: str) -> Description:
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
        pass  # the user lacks the permission, or the provider has renamed the command
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
