"""Allocation of arena rows by number. The arena owns the rows."""

#: The row that every sequence starts from; never written after start.
INITIAL = 0
#: The row for states that no one reads: stateless sequences, warm-up, padding.
SCRATCH = 1

#: The first row for sessions.
FIRST = 2


class Slots:
    """A free list of the rows [first, first + count)."""

    def __init__(self, count: int, first: int = FIRST) -> None:
        self.count = count
        self.end = first + count
        self._fresh = first  # rows from here on have never been taken
        self._first = first
        self._returned: list[int] = []

    def take(self) -> int | None:
        """Take a free row; returns None if all are taken. Unused rows are taken in ascending order."""
        if self._returned:
            return self._returned.pop()
        if self._fresh == self.end:
            return None
        self._fresh += 1
        return self._fresh - 1

    def give_back(self, slot: int) -> None:
        self._returned.append(slot)

    @property
    def has_free(self) -> bool:
        return bool(self._returned) or self._fresh < self.end

    @property
    def taken(self) -> int:
        return self._fresh - self._first - len(self._returned)
