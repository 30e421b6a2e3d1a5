"""Exports sessions from a store to a state file (`state_file.py`), and imports them."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from dataclasses import replace as changed
from pathlib import Path

from unroll.service.core.errors import SessionContended, SnapshotInvalid
from unroll.service.sessions.selection import Selection, every
from unroll.service.store import state_file
from unroll.service.store.interface import Commit, Key, Store, Tokens
from unroll.service.store.record import STORED, Gone, Record

IMPORTED, REPLACED, EXISTS, ENDED = "imported", "replaced", "open, not imported", "ended, not imported"
_AT_ONCE = 100
#: Attempts to replace a session that servers update concurrently.
_ATTEMPTS = 8


async def export(store: Store, selection: Selection, path: Path) -> tuple[int, list[Key]]:
    """Write open sessions to a new file.

    Returns:
        Their number, and the keys of damaged sessions.

    Raises:
        OSError: The file exists, or cannot be written.
        StoreUnavailable: The store does not answer.
    """
    damaged: list[Key] = []
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise OSError(f"{path} exists; specify a new file") from None
    with os.fdopen(descriptor, "w+b") as file, ExitStack() as on_error:
        on_error.callback(path.unlink)
        writer = state_file.Writer(file)
        async for found in every(store, selection):
            damaged += found.damaged
            for selected in found.sessions:
                key = selected.session.key
                try:
                    record = await store.load(key)
                except SnapshotInvalid:
                    damaged.append(key)
                    continue
                if isinstance(record, Record):  # otherwise it has just ended
                    writer.add(key, record, selected.idle or 0.0)
        count = writer.finish()
        os.fsync(descriptor)
        on_error.pop_all()
    return count, damaged


async def import_file(store: Store, path: Path, *, replace: bool) -> AsyncIterator[tuple[Key, str]]:
    """Import the sessions of a file; yield each with its outcome. Their idle times restart.

    Args:
        replace: Also import sessions that are open in the store, or have ended there.

    Raises:
        SnapshotInvalid: The file is damaged; nothing was imported.
        OSError: The file cannot be read.
        StoreUnavailable: The store does not answer; the sessions yielded so far are imported.
    """
    sessions, tokens = state_file.read(path), Tokens()
    for begin in range(0, len(sessions), _AT_ONCE):
        some = sessions[begin : begin + _AT_ONCE]
        if not replace:
            known = await asyncio.gather(*(_has_ended(store, key) for key, _, _ in some))
            for (key, _, _), ended in zip(some, known, strict=True):
                if ended:
                    yield key, ENDED
            some = [session for session, ended in zip(some, known, strict=True) if not ended]
        errors = await store.commit([_commit(key, b"", tokens.next(), record) for key, record, _ in some])
        for (key, record, _), error in zip(some, errors, strict=True):
            if error is None:
                yield key, IMPORTED
            elif not isinstance(error, SessionContended):
                raise error
            else:
                yield key, await _replace(store, key, record, tokens) if replace else EXISTS


async def _has_ended(store: Store, key: Key) -> bool:
    with suppress(SnapshotInvalid):  # a damaged session counts as open
        return isinstance(await store.load(key), Gone)
    return False


async def _replace(store: Store, key: Key, record: Record, tokens: Tokens) -> str:
    for _ in range(_ATTEMPTS):
        known = await store.load(key)
        expected = known.token if isinstance(known, Record) else b""
        (error,) = await store.commit([_commit(key, expected, tokens.next(), record)])
        if error is None:
            return REPLACED
        if not isinstance(error, SessionContended):
            raise error
    return "not replaced, because servers keep updating it"


def _commit(key: Key, expected: bytes, token: bytes, record: Record) -> Commit:
    record = changed(record, origin=changed(record.origin, durability=STORED))  # any server can continue it
    return Commit(key, expected, token, record.packed(), begins=True)
