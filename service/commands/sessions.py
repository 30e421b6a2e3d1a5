"""`unroll sessions`: lists, shows, closes, exports and imports the sessions of a store."""

import argparse
import asyncio
import json
import os
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from unroll.service.commands import transfer
from unroll.service.core.errors import UnrollError
from unroll.service.sessions.selection import Selection, describe, select
from unroll.service.settings import SettingsRefused, store_config_of
from unroll.service.store.embedded_store import EmbeddedStoreConfig
from unroll.service.store.interface import Store, StoreRefused
from unroll.service.store.lmdb_folder import is_store
from unroll.service.store.opening import StoreConfig, open_store
from unroll.service.store.record import Gone, Record
from unroll.service.telemetry import logs

_EPILOG = """\
exit status: 0  done
             1  not for all of the sessions that were named; the output says for which
             2  the store cannot be used, or an option is wrong

Servers may use the store at the same time. Idle times are those of servers with the same --idle-timeout."""

_Work = Callable[[Store, StoreConfig, argparse.Namespace], Awaitable[int]]


def main(argv: list[str]) -> int:
    """Return the exit status that the help describes."""
    options = _parser().parse_args(argv)
    if options.store is None:
        print("unroll sessions: give --store URL, or set UNROLL_STORE", file=sys.stderr)
        return 2
    logs.configure_embedded()  # on stderr
    try:
        return asyncio.run(_run(options))
    except UnrollError as error:
        problem = error.message
    except (SettingsRefused, StoreRefused, OSError) as error:
        problem = str(error)
    print(f"unroll sessions: {problem}", file=sys.stderr)
    return 2


async def _run(options: argparse.Namespace) -> int:
    given = {"--idle-timeout": options.idle_timeout, "--store-prefix": options.store_prefix}
    flags = [f"{flag}={value}" for flag, value in given.items() if value is not None]
    config = store_config_of(options.store, *flags)
    if isinstance(config, EmbeddedStoreConfig) and options.work is not _import and not is_store(config.folder):
        raise OSError(f"there is no store in {config.folder}")
    store = open_store(config)
    try:
        work: _Work = options.work
        return await work(store, config, options)
    finally:
        await store.stop()


async def _list(store: Store, config: StoreConfig, options: argparse.Namespace) -> int:
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


async def _show(store: Store, config: StoreConfig, options: argparse.Namespace) -> int:
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


async def _close(store: Store, config: StoreConfig, options: argparse.Namespace) -> int:
    missing = 0
    for session in options.session:
        position = await store.close((options.model, session))
        missing += position is None
        print(f"{describe(session)}: {'not open' if position is None else f'closed at position {position}'}")
    return int(missing > 0)


async def _export(store: Store, config: StoreConfig, options: argparse.Namespace) -> int:
    count, damaged = await transfer.export(store, _selection(options, config), options.file)
    print(f"{count} sessions written to {options.file}")
    for model, session_id in damaged:
        print(f"damaged, not written: {describe(model)} {describe(session_id)}")
    return int(bool(damaged))


async def _import(store: Store, config: StoreConfig, options: argparse.Namespace) -> int:
    outcomes: dict[str, int] = {}
    async for (model, session_id), outcome in transfer.import_file(store, options.file, replace=options.replace):
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if outcome not in (transfer.IMPORTED, transfer.REPLACED):
            print(f"{outcome}: {describe(model)} {describe(session_id)}")
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "no sessions in the file")
    return int(not outcomes.keys() <= {transfer.IMPORTED, transfer.REPLACED})


def _floats(record: Record) -> list[float]:
    return [value for (value,) in struct.iter_unpack("<f", record.row)]


def _selection(options: argparse.Namespace, config: StoreConfig) -> Selection:
    return Selection(options.model, options.min_idle, options.min_position, options.max_position, config.idle_timeout)


# ── options ──────────────────────────────────────────────────────────────────────────────────────


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("unroll sessions", description="Look after the sessions of a store.")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = _add(actions, "list", _list, "list open sessions, a page at a time; never their states")
    _add_filters(action)
    action.add_argument("--limit", type=_positive, default=100, help="maximum sessions of a page (default: 100)")
    action.add_argument("--after", default="", metavar="PAGE", help="continue where the page before ended, as it says")
    action.add_argument("--json", action="store_true", help="print one JSON document")
    action = _add(actions, "show", _show, "show one session, and what is known of one that has ended")
    _add_names(action, None)
    action.add_argument("--state", action="store_true", help="also its state, as numbers")
    action.add_argument("--json", action="store_true", help="print one JSON document")
    _add_names(_add(actions, "close", _close, "close sessions; their next request gets 410 session_closed"), "+")
    action = _add(actions, "export", _export, "write open sessions to a file, with their states; they stay open")
    _add_filters(action)
    action.add_argument("file", type=Path, metavar="FILE", help="must not exist")
    action = _add(actions, "import", _import, "read the sessions of a file of `export` or of --state-file")
    action.add_argument(
        "--replace",
        action="store_true",
        help="also sessions that are open, or have ended; else they stay so",
    )
    action.add_argument("file", type=Path, metavar="FILE")
    return parser


def _add(actions: Any, name: str, work: _Work, about: str) -> argparse.ArgumentParser:
    action: argparse.ArgumentParser = actions.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action.set_defaults(work=work)
    action.add_argument(
        "--store",
        metavar="URL",
        default=os.environ.get("UNROLL_STORE"),
        help="as for `unroll serve` (default: $UNROLL_STORE)",
    )
    action.add_argument(
        "--store-prefix", metavar="PREFIX", help="of keys in Redis, as of the servers (default: theirs)"
    )
    action.add_argument(
        "--idle-timeout", metavar="SECONDS", help="as of the servers (default: $UNROLL_IDLE_TIMEOUT, or theirs)"
    )
    return action


def _add_filters(action: argparse.ArgumentParser) -> None:
    action.add_argument("--model", help="only sessions of this model")
    action.add_argument("--min-idle", type=float, metavar="SECONDS", help="only sessions idle for so long")
    action.add_argument("--min-position", type=int, default=0, metavar="N", help="only sessions from this position on")
    action.add_argument("--max-position", type=int, metavar="N", help="only sessions up to this position")


def _add_names(action: argparse.ArgumentParser, count: str | None) -> None:
    action.add_argument("model", metavar="MODEL")
    action.add_argument("session", metavar="SESSION", nargs=count)


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError("give a number above 0")
    return int(word)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
