"""What `unroll sessions` does: lists, shows, closes, exports and imports the sessions of a store."""

import asyncio
import json
import struct
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from unroll.service.commands import transfer
from unroll.service.core.errors import UnrollError
from unroll.service.sessions.selection import Selection, describe, select
from unroll.service.sources import SettingsRefused, store_config_of
from unroll.service.store.embedded_store import EmbeddedStoreConfig
from unroll.service.store.interface import Store, StoreRefused
from unroll.service.store.lmdb_folder import is_store
from unroll.service.store.opening import StoreConfig, open_store
from unroll.service.store.record import Gone, Record
from unroll.service.telemetry import logs

if TYPE_CHECKING:
    from unroll.commands import sessions as commands


class StoreUnusable(Exception):
    """The store cannot be used as it is set; the message says why."""


def run(options: "commands.OnStore", url: str) -> int:
    """Do what one of the commands is asked to; returns its exit status. Raises StoreUnusable."""
    logs.configure_embedded()  # on stderr
    try:
        return asyncio.run(_run(options, url))
    except UnrollError as error:
        raise StoreUnusable(error.message) from error
    except (SettingsRefused, StoreRefused, OSError) as error:
        raise StoreUnusable(str(error)) from error


async def _run(options: "commands.OnStore", url: str) -> int:
    config = store_config_of(url, idle_timeout=options.idle_timeout, store_prefix=options.store_prefix)
    work = _WORK[type(options).__name__]
    if isinstance(config, EmbeddedStoreConfig) and work is not _import and not is_store(config.folder):
        raise OSError(f"there is no store in {config.folder}")
    store = open_store(config)
    try:
        return await work(store, config, options)
    finally:
        await store.stop()


async def _list(store: Store, config: StoreConfig, options: "commands.List") -> int:
    found, after = await select(store, _selection(options, config), options.after, options.limit)
    if options.json:
        print(json.dumps(found.document(after), indent=2))
        return 0
    for session in found.sessions:
        print(session.line())
    for model, session_id in found.damaged:
        print(f"damaged: {describe(model)} {describe(session_id)}")
    print(f"{len(found.sessions)} sessions" + (f"; more: --after {after}" if after else ""))
    return 0


async def _show(store: Store, config: StoreConfig, options: "commands.Show") -> int:
    known = await store.load((options.model, options.session))
    if known is None:
        print("unknown", file=sys.stderr)
        return 1
    document: dict[str, Any] = {"model": options.model, "session_id": options.session, "digest": known.origin.model}
    document |= {"durability": known.origin.durability, "replies": [[one.start, one.steps] for one in known.kept]}
    if isinstance(known, Gone):
        document |= {"ended": known.cause}
    else:
        document |= {"position": known.position, "state_bytes": len(known.row)}
        if options.state:
            document |= {"state": _floats(known)}
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        for name, value in document.items():
            print(f"{name:<12} {describe(value) if isinstance(value, str) else value}")
    return int(isinstance(known, Gone))


async def _close(store: Store, config: StoreConfig, options: "commands.Close") -> int:
    positions = {session: await store.close((options.model, session)) for session in options.session}
    if options.json:
        print(json.dumps({"closed": positions}, indent=2))
    else:
        for session, position in positions.items():
            print(f"{describe(session)}: {'not open' if position is None else f'closed at position {position}'}")
    return int(None in positions.values())


async def _export(store: Store, config: StoreConfig, options: "commands.Export") -> int:
    count, damaged = await transfer.export(store, _selection(options, config), options.file)
    if options.json:
        print(json.dumps({"written": count, "file": str(options.file), "damaged": damaged}, indent=2))
        return int(bool(damaged))
    print(f"{count} sessions written to {options.file}")
    for model, session_id in damaged:
        print(f"damaged, not written: {describe(model)} {describe(session_id)}")
    return int(bool(damaged))


async def _import(store: Store, config: StoreConfig, options: "commands.Import") -> int:
    outcomes: dict[str, int] = {}
    left: list[dict[str, str]] = []
    async for (model, session_id), outcome in transfer.import_file(store, options.file, replace=options.replace):
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if outcome not in (transfer.IMPORTED, transfer.REPLACED):
            left.append({"model": model, "session_id": session_id, "outcome": outcome})
    if options.json:
        print(json.dumps({"outcomes": outcomes, "left": left}, indent=2))
        return int(bool(left))
    for one in left:
        print(f"{one['outcome']}: {describe(one['model'])} {describe(one['session_id'])}")
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "no sessions in the file")
    return int(bool(left))


def _floats(record: Record) -> list[float]:
    return [value for (value,) in struct.iter_unpack("<f", record.row)]


def _selection(options: "commands.Filtered", config: StoreConfig) -> Selection:
    return Selection(options.model, options.min_idle, options.min_position, options.max_position, config.idle_timeout)


#: By the name of the command's options.
_WORK: dict[str, Callable[[Store, StoreConfig, Any], Awaitable[int]]] = {
    "List": _list,
    "Show": _show,
    "Close": _close,
    "Export": _export,
    "Import": _import,
}
