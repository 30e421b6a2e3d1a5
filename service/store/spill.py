"""Spilled sessions as bytes in host memory, oldest first."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice

from unroll.service.core.session_ids import tenant_of
from unroll.service.store.interface import Key
from unroll.service.store.record import Record

#: Approximate overhead of a record, besides its row and its replies.
_RECORD_BYTES = 512
#: Maximum number of records to examine for one of a tenant.
_MOST_LOOKED_AT = 1000


class Spill:
    """limit: bytes. The caller moves records beyond it elsewhere; see `overflow`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.of_tenants: Counter[str] = Counter()
        self._records: OrderedDict[Key, tuple[Record, float]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def __iter__(self) -> Iterator[tuple[Key, Record, float]]:
        """Yields key, record, and time of last use."""
        return ((key, record, used) for key, (record, used) in self._records.items())

    def keys(self) -> Iterable[Key]:
        return self._records.keys()

    def get(self, key: Key) -> tuple[Record, float] | None:
        return self._records.get(key)

    def put(self, key: Key, record: Record, used: float) -> None:
        self.take(key)
        self._records[key] = record, used
        self._bytes += _size(record)
        self.of_tenants[tenant_of(key[1])] += 1

    def take(self, key: Key) -> tuple[Record, float] | None:
        """Remove a record. Returns it and its time of last use."""
        found = self._records.pop(key, None)
        if found is not None:
            self._bytes -= _size(found[0])
            self.of_tenants -= Counter((tenant_of(key[1]),))
        return found

    def has_room(self, record: Record) -> bool:
        return self._bytes + _size(record) <= self.limit

    def overflow(self, tenant: str) -> tuple[Key, Record, float] | None:
        """If the limit is exceeded, remove the oldest record of the tenant, which owns the newest one."""
        if self._bytes <= self.limit:
            return None
        oldest = (key for key in islice(self._records, _MOST_LOOKED_AT) if tenant_of(key[1]) == tenant)
        return self._remove(next(oldest, next(reversed(self._records))))

    def expired(self, before: float) -> tuple[Key, Record, float] | None:
        """Remove the oldest record if its last use was at `before` or earlier."""
        for _, used in self._records.values():
            return self._remove(next(iter(self._records))) if used <= before else None
        return None

    def _remove(self, key: Key) -> tuple[Key, Record, float]:
        found = self.take(key)
        assert found is not None
        return key, *found


def _size(record: Record) -> int:
    return _RECORD_BYTES + len(record.row) + sum(len(kept.outputs) for kept in record.kept)
