"""An in-memory store for tests. It keeps the contract of `interface.py`, but sessions do not expire."""

from collections.abc import Sequence

from unroll.service.core.errors import UnrollError
from unroll.service.core.session_ids import tenant_of
from unroll.service.store.interface import Commit, Key, Listed, Page, refused_commit
from unroll.service.store.record import Gone, Record
from unroll.service.telemetry.metrics import StoreFigures


class MemoryStore:
    def __init__(self) -> None:
        self._records: dict[Key, Record] = {}
        self._gone: dict[Key, tuple[Gone, bytes]] = {}
        self._taken: set[bytes] = set()
        self.figures = StoreFigures()

    async def start(self) -> None: ...
    async def stop(self) -> None: ...

    async def commit(self, commits: Sequence[Commit]) -> list[UnrollError | None]:
        return [self._commit(commit) for commit in commits]

    async def load(self, key: Key) -> Record | Gone | None:
        if (record := self._records.get(key)) is not None:
            return record
        return self._gone[key][0] if key in self._gone else None

    async def load_all(self, keys: Sequence[Key]) -> list[Record | Gone | UnrollError | None]:
        return [await self.load(key) for key in keys]

    def newer(self, key: Key, token: bytes) -> Record | None:
        record = self._records.get(key)
        return None if record is None or record.token == token else record

    async def close(self, key: Key, origin: bytes = b"") -> int | None:
        record = self._records.get(key)
        if record is None or origin not in (b"", record.origin.to_bytes()):
            return None
        del self._records[key]
        self._gone[key] = Gone("session_closed", record.origin), b""
        return record.position

    async def take(self, key: Key, token: bytes, attempt: bytes = b"") -> bool:
        record = self._records.get(key)
        if record is None or record.token != token:
            return attempt != b"" and attempt in self._taken
        self._taken.add(attempt)
        del self._records[key]
        return True

    async def page(self, after: str, limit: int, tenant: str | None = None) -> Page:
        names = sorted("/".join(key) for key in self._records if tenant in (None, tenant_of(key[1])))
        chosen = [name for name in names if name > after][:limit]
        keys: list[Key] = [(name.partition("/")[0], name.partition("/")[2]) for name in chosen]
        records = [self._records[key] for key in keys]
        sessions = [_listed(key, record) for key, record in zip(keys, records, strict=True)]
        return Page(sessions, [], chosen[-1] if chosen and chosen[-1] != names[-1] else "")

    def _commit(self, commit: Commit) -> UnrollError | None:
        record = self._records.get(commit.key)
        held = b"" if record is None else record.token
        if commit.token in (held, self._gone.get(commit.key, (None, b""))[1]):
            return None
        if held != commit.expected:
            return refused_commit(commit.key, record)
        new = Record.unpack(commit.content, commit.token)
        if commit.ends:
            self._records.pop(commit.key, None)
            self._gone[commit.key] = Gone("session_closed", new.origin, new.kept), commit.token
            return None
        self._records[commit.key] = new
        self._gone.pop(commit.key, None)
        return None


def _listed(key: Key, record: Record) -> Listed:
    size = len(record.row) + len(record.last)
    return Listed(key, record.origin.model, record.origin.durability, record.position, None, size)
