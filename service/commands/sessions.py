"""`unroll sessions`: lists, shows, closes, exports and imports the sessions of a store."""

import asyncio
import json
import struct
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from unroll.service.commands import transfer
from unroll.service.core.errors import UnrollError
from unroll.service.core.session_ids import owned
from unroll.service.sessions.selection import Selection, describe, named, select
from unroll.service.sources import SettingsRefused, store_config_of
from unroll.service.store.embedded_store import EmbeddedStoreConfig
from unroll.service.store.interface import Key, Store, StoreRefused
from unroll.service.store.lmdb_folder import is_store
from unroll.service.store.opening import StoreConfig, open_store
from unroll.service.store.record import Gone, Record
from unroll.service.telemetry import logs

if TYPE_CHECKING:
    from unroll.commands import sessions as commands


class StoreUnusable(Exception):
    """The store cannot be used as configured; the message says why."""


def run(options: "commands.OnStore", url: str) -> int:
    """Run one of the commands; returns its exit status. Raises StoreUnusable."""
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
    lines = [*(session.line() for session in found.sessions), *(f"damaged: {_words(key)}" for key in found.damaged)]
    lines.append(f"sessions: {len(found.sessions)}" + (f"; more: --after {after}" if after else ""))
    _print(options, found.document(after), lines)
    return 0


async def _show(store: Store, config: StoreConfig, options: "commands.Show") -> int:
    key = options.model, owned(options.tenant, options.session)
    known = await store.load(key)
    if known is None:
        print("unknown", file=sys.stderr)
        return 1
    document: dict[str, Any] = {**named(key), "digest": known.origin.model}
    document |= {"durability": known.origin.durability, "replies": [[one.start, one.steps] for one in known.kept]}
    if isinstance(known, Gone):
        document |= {"ended": known.cause}
    else:
        document |= {"position": known.position, "state_bytes": len(known.row)}
        if options.state:
            document |= {"state": _floats(known)}
    shown = {name: describe(value) if isinstance(value, str) else value for name, value in document.items()}
    _print(options, document, [f"{name:<12} {value}" for name, value in shown.items()])
    return int(isinstance(known, Gone))


async def _close(store: Store, config: StoreConfig, options: "commands.Close") -> int:
    keys = {session: (options.model, owned(options.tenant, session)) for session in options.session}
    positions = {session: await store.close(key) for session, key in keys.items()}
    results = {id: "not open" if at is None else f"closed at position {at}" for id, at in positions.items()}
    _print(options, {"closed": positions}, [f"{describe(session)}: {result}" for session, result in results.items()])
    return int(None in positions.values())


async def _export(store: Store, config: StoreConfig, options: "commands.Export") -> int:
    count, damaged = await transfer.export(store, _selection(options, config), options.file)
    document = {"written": count, "file": str(options.file), "damaged": [*map(named, damaged)]}
    skipped = [f"damaged, not written: {_words(key)}" for key in damaged]
    _print(options, document, [f"sessions written to {options.file}: {count}", *skipped])
    return int(bool(damaged))


async def _import(store: Store, config: StoreConfig, options: "commands.Import") -> int:
    outcomes: Counter[str] = Counter()
    skipped: list[tuple[Key, str]] = []
    async for key, outcome in transfer.import_file(store, options.file, replace=options.replace):
        outcomes[outcome] += 1
        if outcome not in (transfer.IMPORTED, transfer.REPLACED):
            skipped.append((key, outcome))
    documents = [named(key) | {"outcome": outcome} for key, outcome in skipped]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    lines = [*(f"{outcome}: {_words(key)}" for key, outcome in skipped), counts or "no sessions in the file"]
    _print(options, {"outcomes": outcomes, "left": documents}, lines)
    return int(bool(skipped))


def _print(options: Any, document: dict[str, Any], lines: list[str]) -> None:
    print(json.dumps(document, indent=2) if options.json else "\n".join(lines))


def _floats(record: Record) -> list[float]:
    return [value for (value,) in struct.iter_unpack("<f", record.row)]


def _selection(options: "commands.Filtered", config: StoreConfig) -> Selection:
    positions = options.min_position, options.max_position
    return Selection(options.model, options.min_idle, *positions, config.idle_timeout, options.tenant or None)


def _words(key: Key) -> str:
    return " ".join(describe(value) for value in named(key).values())


#: Implementations, by the class name of the command's options.
_WORK: dict[str, Callable[[Store, StoreConfig, Any], Awaitable[int]]] = {
    "List": _list,
    "Show": _show,
    "Close": _close,
    "Export": _export,
    "Import": _import,
}
