"""Lists the open sessions in Redis in pages: one SCAN per page, and node after node in a cluster.

A page's name consists of the node's number, SCAN's cursor, and the last key of the previous page at that cursor.
"""

import struct
from typing import Any

from redis.asyncio.cluster import RedisCluster

from unroll.service.core.errors import InvalidRequest, SnapshotInvalid
from unroll.service.core.session_ids import mark
from unroll.service.store.interface import Key, Listed, Page
from unroll.service.store.record import ORIGIN_BYTES, WHOLE, Origin

_TOKEN = 16
_HEAD = _TOKEN + ORIGIN_BYTES + WHOLE.size
#: Keys examined per SCAN; half of them are traces, not sessions. Constant, because a cursor may serve several pages.
_COUNT = 500


async def read_page(client: Any, prefix: str, after: str, limit: int, tenant: str | None) -> Page:
    """See `Store.page`. Raises RedisError, OSError, InvalidRequest."""
    nodes: list[Any] = [None]
    if isinstance(client, RedisCluster):
        await client.initialize()
        nodes = sorted(client.get_primaries(), key=lambda node: node.name)
    number, cursor, last = _parse(after, len(nodes))
    where = {} if nodes[number] is None else {"target_nodes": nodes[number]}
    pattern = f"{prefix}:{{*/{mark(tenant)}*}}" if tenant else f"{prefix}:{{*}}"
    following, found = await client.execute_command("SCAN", cursor, "MATCH", pattern, "COUNT", _COUNT, **where)
    if where:
        following = following[nodes[number].name]
    later = sorted(key for key in found if key > last)
    keys = later[:limit]
    if len(later) > limit:
        page = Page([], [], f"{number}.{cursor}.{keys[-1].hex()}")
    else:
        page = Page([], [], _next(number, int(following), len(nodes)))
    pipeline = client.pipeline(**({} if where else {"transaction": False}))
    for key in keys:
        pipeline.getrange(key, 0, _HEAD - 1).strlen(key).pttl(key)
    heads = await pipeline.execute() if keys else []
    for index, key in enumerate(keys):
        _add(page, _key_of(key, prefix), *heads[3 * index : 3 * index + 3])
    return page


def _add(page: Page, key: Key, head: bytes, size: int, milliseconds: int) -> None:
    if not head:  # it has ended since the SCAN
        return
    try:
        origin = Origin.from_bytes(head[_TOKEN : _TOKEN + ORIGIN_BYTES])
        position, row, last = WHOLE.unpack(head[_TOKEN + ORIGIN_BYTES :])
        if size != _HEAD + row + last:
            raise SnapshotInvalid("the lengths in a stored session contradict its size")
    except (SnapshotInvalid, struct.error):
        page.damaged.append(key)
        return
    expires_in = milliseconds / 1000 if milliseconds >= 0 else None
    page.sessions.append(Listed(key, origin.model, origin.durability, position, expires_in, size))


def _key_of(key: bytes, prefix: str) -> Key:
    model, _, session = key[len(prefix) + 2 : -1].decode(errors="replace").partition("/")
    return model, session


def _parse(after: str, nodes: int) -> tuple[int, int, bytes]:
    try:
        number, cursor, last = (after or "0.0.").split(".")
        parsed = int(number), int(cursor), bytes.fromhex(last)
        if 0 <= parsed[0] < nodes:
            return parsed
    except ValueError:
        pass
    raise InvalidRequest(f"unknown page {after!r}; use `after` of the previous page")


def _next(number: int, cursor: int, nodes: int) -> str:
    if cursor:
        return f"{number}.{cursor}."
    return f"{number + 1}.0." if number + 1 < nodes else ""
