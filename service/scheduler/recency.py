"""The order of last use, as a linked list where several entries can replace one."""

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar


class Used:
    """Base class of entries; `Recency` owns the links."""

    __slots__ = ("newer", "older")
    newer: "Used"
    older: "Used"


T = TypeVar("T", bound=Used)


class Recency(Generic[T]):
    """Least recently used first."""

    def __init__(self) -> None:
        self._ends = ends = Used()  # sentinel of a circular list
        ends.newer = ends.older = ends

    def __iter__(self) -> Iterator[T]:
        entry: Any = self._ends.newer
        while entry is not self._ends:
            yield entry
            entry = entry.newer

    @property
    def oldest(self) -> T | None:
        entry: Any = self._ends.newer
        return None if entry is self._ends else entry

    def add(self, entry: T) -> None:
        """Add an entry as the most recently used."""
        _link(entry, self._ends.older, self._ends)

    def remove(self, entry: T) -> None:
        entry.older.newer, entry.newer.older = entry.newer, entry.older

    def touch(self, *entries: T) -> None:
        """Make entries the most recently used, the last one most."""
        ends = self._ends
        for entry in entries:
            older, newer, last = entry.older, entry.newer, ends.older
            if newer is not ends:
                older.newer, newer.older = newer, older
                last.newer, entry.older, entry.newer, ends.older = entry, last, ends, entry

    def replace(self, entry: T, others: Iterable[T]) -> None:
        """Replace an entry with several, in order."""
        for other in others:
            _link(other, entry.older, entry)
        self.remove(entry)


def _link(entry: Used, older: Used, newer: Used) -> None:
    entry.older, entry.newer = older, newer
    older.newer = newer.older = entry
