"""The interface of session stores. One implementation per file.

A session has one key, (model name, session id), and one record, which changes as a whole. Every write carries a unique
token and names the token that it expects in the store. So a replica with a stale copy cannot overwrite a newer record,
whether another replica advanced the session, restored it, or closed it and opened another of the same id.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from unroll.service.core.errors import SessionContended, UnrollError
from unroll.service.core.session_ids import shown
from unroll.service.store.record import Gone, Record
from unroll.service.telemetry.metrics import StoreFigures

Key = tuple[str, str]


class StoreRefused(Exception):
    """The store can never work as it is set; the message says what to change."""


@dataclass(slots=True, eq=False)
class Commit:
    """The next state of a session.

    Attributes:
        expected: The token of the record that this one follows; empty: the session must not exist.
        content: The record, as `pack` makes it.
        begins: This is the session's first commit.
        ends: The commit closes the session: its last chunk stays available for retries, and the row is removed.
    """

    key: Key
    expected: bytes
    token: bytes
    content: bytes
    begins: bool = False
    ends: bool = False


def refused_commit(key: Key, record: Record | None) -> SessionContended:
    """The result of a commit that does not follow what the store has. record: None if it has no session."""
    error = SessionContended(f"session {shown(key[1])!r} was updated by another replica; retry", 0.1)
    error.record = record
    return error


@dataclass(frozen=True, slots=True)
class Listed:
    """An open session.

    Attributes:
        digest: SHA-256 of its model, hexadecimal.
        durability: One of `DURABILITIES`.
        expires_in: Seconds until it expires, unless it is used before; None: never.
    """

    key: Key
    digest: str
    durability: str
    position: int
    expires_in: float | None
    bytes: int


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the open sessions.

    Attributes:
        sessions: May be none although there are more.
        damaged: The keys of sessions among them that cannot be read.
        after: Names the next page; empty: there is none.
    """

    sessions: list[Listed]
    damaged: list[Key]
    after: str


class Pages(Protocol):
    async def page(self, after: str, limit: int, tenant: str | None = None) -> Page:
        """The page that `after` names; empty: the first. Every session that is open all the time is on one, or on
        several.

        Args:
            tenant: Only its sessions, and no page is named by another's; None: all. Empty: may be all.

        Raises:
            StoreUnavailable: The store does not answer.
            InvalidRequest: `after` names no page.
        """


class Store(Pages, Protocol):
    """Records of sessions, shared by replicas.

    The store alone decides when a durable session has expired: after the idle timeout since its last commit, by the
    store's own clock. An expired session is `Gone` with that cause until its tombstone's life ends, and `None` after.

    `load`, `close` and `take` raise StoreUnavailable if the store does not answer in time or cannot write; `commit`
    returns the error instead.
    """

    figures: StoreFigures

    async def commit(self, commits: Sequence[Commit]) -> list[UnrollError | None]:
        """The result of each commit: None if it is in the store, also if it was sent twice; SessionContended, with the
        record, if the store has another token; StoreUnavailable if that is unknown. Never raises."""

    async def load(self, key: Key) -> Record | Gone | None:
        """The record; how the session ended; or None if nothing is known of it. Does not prolong the session's life."""

    async def load_all(self, keys: Sequence[Key]) -> list[Record | Gone | UnrollError | None]:
        """The same of many sessions, in one exchange; in place of a record that cannot be read, the error."""

    async def close(self, key: Key) -> int | None:
        """Close a session, whatever its token. Returns its position, or None if there is none."""

    async def take(self, key: Key, token: bytes, attempt: bytes = b"") -> bool:
        """Remove a record without a tombstone if it has this token: the caller owns the session then.

        attempt: names the call, so that it can be made again if it got no answer, with the same result.
        """

    async def start(self) -> None:
        """Called once, before any other method. Returns when the store has answered once; until then it is logged.
        Raises StoreRefused."""

    async def stop(self) -> None: ...


class Tokens:
    """Generates unique tokens: 8 random bytes of the process, then a counter."""

    def __init__(self) -> None:
        self._process = os.urandom(8)
        self._count = itertools.count()

    def next(self) -> bytes:
        return self._process + next(self._count).to_bytes(8, "little")
