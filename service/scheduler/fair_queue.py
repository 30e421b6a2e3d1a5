"""A queue in which owners take turns, so that no owner waits for another's whole backlog."""

from collections import deque
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush, heapreplace
from typing import Generic, TypeVar

from unroll.service.scheduler.session import Owner, Work

W = TypeVar("W", bound=Work)


class FairQueue(Generic[W]):
    """A `deque` that is fair to owners: the next work belongs to the owner that has had the fewest rows taken.

    An owner that had nothing waiting starts at the count of the owner served last, so turns cannot be saved up.
    """

    def __init__(self, waiting: Iterable[W] = ()) -> None:
        self._waiting: dict[Owner, deque[W]] = {}
        self._turns: list[tuple[int, int, Owner]] = []  # a heap of (rows taken, order of arrival, owner)
        self._taken = self._came = 0
        for work in waiting:
            self.append(work)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __bool__(self) -> bool:
        return bool(self._turns)

    def __iter__(self) -> Iterator[W]:
        for waiting in self._waiting.values():
            yield from waiting

    def __getitem__(self, index: int) -> W:
        assert index == 0, "only the head can be read"
        return self._waiting[self._turns[0][2]][0]

    def owners(self) -> set[Owner]:
        return {*self._waiting}

    def append(self, work: W) -> None:
        owner = work.owner
        waiting = self._waiting.get(owner)
        if waiting is None:
            waiting = self._waiting[owner] = deque()
            self._came += 1
            heappush(self._turns, (self._taken, self._came, owner))
        waiting.append(work)

    def popleft(self) -> W:
        self._taken, came, owner = self._turns[0]
        waiting = self._waiting[owner]
        work = waiting.popleft()
        if waiting:
            heapreplace(self._turns, (self._taken + work.row_count, came, owner))
        else:
            heappop(self._turns)
            del self._waiting[owner]
        return work
