"""The order of last use: a linked list, so that several entries can take the place of one."""

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar


class Used:
    """An entry of the order. Its links belong to `Recency`."""

    __slots__ = ("newer", "older")
    newer: "Used"
    older: "Used"


T = TypeVar("T", bound=Used)


class Recency(Generic[T]):
    """Least recently used first."""

    def __init__(self) -> None:
        self._ends = ends = Used()  # the list is a ring that begins and ends here
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
        """The last to be used."""
        _link(entry, self._ends.older, self._ends)

    def remove(self, entry: T) -> None:
        entry.older.newer, entry.newer.older = entry.newer, entry.older

    def touch(self, entry: T) -> None:
        """It is used again."""
        ends = self._ends
        older, newer, last = entry.older, entry.newer, ends.older
        if newer is not ends:
            older.newer, newer.older = newer, older
            last.newer, entry.older, entry.newer, ends.older = entry, last, ends, entry

    def replace(self, entry: T, others: Iterable[T]) -> None:
        """They take its place, in their order."""
        for other in others:
            _link(other, entry.older, entry)
        self.remove(entry)


def _link(entry: Used, older: Used, newer: Used) -> None:
    entry.older, entry.newer = older, newer
    older.newer = newer.older = entry
