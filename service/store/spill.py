"""Sessions without a row in the arena, as bytes in host memory, oldest first."""

from collections import OrderedDict
from collections.abc import Iterator

from unroll.service.store.interface import Key
from unroll.service.store.record import Record

#: Bytes that a record takes besides its row and its replies, about.
_RECORD_BYTES = 512


class Spill:
    """limit: bytes. The caller moves what exceeds it elsewhere; see `overflow`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._records: OrderedDict[Key, tuple[Record, float]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def __iter__(self) -> Iterator[tuple[Key, Record, float]]:
        """Each with when it was last used."""
        return ((key, record, used) for key, (record, used) in self._records.items())

    def __repr__(self) -> str:
        return f"<Spill {len(self)} sessions, {self._bytes} of {self.limit} bytes>"

    def get(self, key: Key) -> tuple[Record, float] | None:
        return self._records.get(key)

    def put(self, key: Key, record: Record, used: float) -> None:
        self.take(key)
        self._records[key] = record, used
        self._bytes += _size(record)

    def take(self, key: Key) -> tuple[Record, float] | None:
        """Remove a record. Returns it, and when it was last used."""
        found = self._records.pop(key, None)
        if found is not None:
            self._bytes -= _size(found[0])
        return found

    def overflow(self) -> tuple[Key, Record, float] | None:
        """Remove the oldest record while the limit is exceeded."""
        return self._first() if self._bytes > self.limit else None

    def expired(self, before: float) -> tuple[Key, Record, float] | None:
        """Remove the oldest record if it was last used at the time `before` or earlier."""
        for _, used in self._records.values():
            return self._first() if used <= before else None
        return None

    def _first(self) -> tuple[Key, Record, float]:
        key = next(iter(self._records))
        found = self.take(key)
        assert found is not None
        return key, *found


def _size(record: Record) -> int:
    return _RECORD_BYTES + len(record.row) + sum(len(kept.outputs) for kept in record.kept)
