"""Which rows of the arena are taken. Numbers only; the rows themselves are the arena's."""

#: The row every sequence starts from. Read, never written after start.
INITIAL = 0
#: Target of rows that are never read: stateless sequences, warm-up, padding.
SCRATCH = 1

FIRST = 2


class Slots:
    """A free-list over the rows [first, first + count)."""

    def __init__(self, count: int, first: int = FIRST) -> None:
        self.count = count
        self.end = first + count
        self._fresh = first  # rows from here on were never taken
        self._first = first
        self._returned: list[int] = []

    def take(self) -> int | None:
        """A free row, lowest first on a fresh table; None when all are taken."""
        if self._returned:
            return self._returned.pop()
        if self._fresh == self.end:
            return None
        self._fresh += 1
        return self._fresh - 1

    def give_back(self, slot: int) -> None:
        self._returned.append(slot)

    @property
    def taken(self) -> int:
        return self._fresh - self._first - len(self._returned)

    def __repr__(self) -> str:
        return f"<Slots {self.taken}/{self.count}>"
