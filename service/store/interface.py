"""What durable sessions need of a store. One implementation a file.

A session has one key, (model name, session id), and one record, which changes as a whole. Each write carries a token
that no other write has, and says which token it believes to be there: so a replica with an old copy of a session cannot
write over what another made of it, whatever became of it meanwhile: moved on, put back, closed and opened anew.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from unroll.service.core.errors import UnrollError
from unroll.service.store.record import Gone, Kept, Origin, Record

Key = tuple[str, str]


@dataclass(slots=True, eq=False)
class Commit:
    """A session's next state. expected: the token it is the successor of; empty: the session must not be there.

    token: the new one. origin, row, last: as in a record. begins: this is the session's first. ends: it is closed by
    this; what is in `last` can still be asked for then, and the row goes.
    """

    key: Key
    expected: bytes
    token: bytes
    origin: bytes
    position: int
    row: bytes
    last: bytes
    begins: bool = False
    ends: bool = False


class Store(Protocol):
    """Every method raises StoreUnavailable if the store does not answer in time, or cannot write."""

    @property
    def durability(self) -> str:
        """As the API calls it."""
        ...

    async def commit(self, commits: Sequence[Commit]) -> list[UnrollError | None]:
        """None for each that is written, and was before if it comes twice; SessionContended if another token is there,
        StoreUnavailable if that is not known. Never raises."""
        ...

    async def load(self, key: Key) -> Record | Gone | None: ...

    async def close(self, key: Key) -> int | None:
        """End a session, whoever moved it on last. Its position, or None if there is none."""
        ...

    async def take(self, key: Key, token: bytes) -> bool:
        """Remove a record without a trace, if this is its token: who asked has it now."""
        ...

    async def start(self) -> None: ...
    async def stop(self) -> None: ...


class Tokens:
    """Numbers that no other commit of any process has: 8 random bytes of the process, and a counter."""

    def __init__(self) -> None:
        self._process = os.urandom(8)
        self._count = itertools.count()

    def next(self) -> bytes:
        return self._process + next(self._count).to_bytes(8, "little")


__all__ = ["Commit", "Gone", "Kept", "Key", "Origin", "Record", "Store", "Tokens"]
