"""The interface of session stores. Each implementation has its own file.

A session has one key, (model name, session id), and one record, which is replaced as a whole. Every write carries a
unique token and names the token that it expects in the store. Therefore a replica with a stale copy cannot overwrite a
newer record, whether another replica advanced the session, restored it, or replaced it by another with the same id.
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
    """The store cannot work as configured; the message says what to change."""


@dataclass(slots=True, eq=False)
class Commit:
    """The next state of a session.

    Attributes:
        expected: The token of the previous record; empty if the session must not exist.
        content: The record, from `pack`.
        begins: This is the session's first commit.
        ends: The commit closes the session. Its last chunk stays available for retries; the row is removed.
    """

    key: Key
    expected: bytes
    token: bytes
    content: bytes
    begins: bool = False
    ends: bool = False


def refused_commit(key: Key, record: Record | None) -> SessionContended:
    """The result of a commit whose `expected` token is not the store's. record: the store's, if it has the session."""
    error = SessionContended(f"session {shown(key[1])!r} was updated by another replica; retry", 0.1)
    error.record = record
    return error


@dataclass(frozen=True, slots=True)
class Listed:
    """An open session.

    Attributes:
        digest: SHA-256 of the model, hexadecimal.
        durability: One of `DURABILITIES`.
        expires_in: Seconds until it expires unless it is used; None for never.
    """

    key: Key
    digest: str
    durability: str
    position: int
    expires_in: float | None
    bytes: int


@dataclass(frozen=True, slots=True)
class Page:
    """One page of the open sessions.

    Attributes:
        sessions: May be empty although there are more.
        damaged: Keys of sessions that cannot be read.
        after: Name of the next page; empty if there is none.
    """

    sessions: list[Listed]
    damaged: list[Key]
    after: str


class Pages(Protocol):
    async def page(self, after: str, limit: int, tenant: str | None = None) -> Page:
        """Read a page. Every session that stays open throughout is on at least one page.

        Args:
            after: Name of the page; empty for the first.
            limit: Maximum number of sessions.
            tenant: Only this tenant's sessions, and no page name reveals another's; None: all. Empty: may be all.

        Raises:
            StoreUnavailable: The store does not answer.
            InvalidRequest: There is no page `after`.
        """


class Store(Pages, Protocol):
    """Records of sessions, shared by replicas.

    Only the store decides when a durable session expires: one idle timeout after its last commit, by the store's own
    clock. An expired session is `Gone` until its tombstone's life ends, and `None` afterwards.

    `load`, `close` and `take` raise StoreUnavailable if the store does not answer in time or cannot write; `commit`
    returns the error instead.
    """

    figures: StoreFigures

    async def commit(self, commits: Sequence[Commit]) -> list[UnrollError | None]:
        """Write records. Never raises.

        Returns:
            Per commit: None if it is in the store, even if it was sent twice; SessionContended, with the record, if the
            store has another token; StoreUnavailable if the outcome is unknown.
        """

    async def load(self, key: Key) -> Record | Gone | None:
        """The record, or how the session ended, or None if it is unknown. Does not extend the session's life."""
        (found,) = await self.load_all([key])
        if isinstance(found, UnrollError):
            raise found
        return found

    async def load_all(self, keys: Sequence[Key]) -> list[Record | Gone | UnrollError | None]:
        """`load` for many sessions in one exchange. A record that cannot be read is replaced by its error."""
        raise NotImplementedError

    def newer(self, key: Key, token: bytes) -> Record | None:
        """The record, if the store can read it at once and its token is another one. None tells nothing."""
        return None

    async def close(self, key: Key, origin: bytes = b"") -> int | None:
        """Close a session, whatever its token. Returns its position, or None if there is none.

        origin: only the session with this origin, not another that was opened with its id since. Empty: any.
        """

    async def take(self, key: Key, token: bytes, attempt: bytes = b"") -> bool:
        """Remove a record without a tombstone if it has this token; the caller then owns the session.

        attempt: identifies the call, so that repeating it after a lost answer has the same result.
        """

    async def start(self) -> None:
        """Called once, before any other method. Waits, and logs that it does, until the store answers.

        Raises StoreRefused.
        """

    async def stop(self) -> None: ...


class Tokens:
    """Generates unique tokens: 8 random bytes of the process, then a counter."""

    def __init__(self) -> None:
        self._process = os.urandom(8)
        self._count = itertools.count()

    def next(self) -> bytes:
        return self._process + next(self._count).to_bytes(8, "little")

    def take(self, count: int) -> list[bytes]:
        """The next `count` tokens."""
        process = self._process
        return [process + number.to_bytes(8, "little") for number in itertools.islice(self._count, count)]
