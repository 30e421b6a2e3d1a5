"""What a call of a model costs by its number of rows and steps: measured once at load, then looked up.

Nearly a straight line for most models, but not from nothing: one row may cost as much as twenty. And not without
steps: onnxruntime's kernels take rows by the half dozen. Pure: who measures brings the call and the clock.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

#: (rows, seconds) of a call.
Point = tuple[int, float]

#: Rows that cost this part more each than in a larger call are not worth its wait.
_WORTH_WAITING = 0.03
#: What a call costs besides, in the loop and the scheduler.
_TURN_SECONDS = 20e-6
#: A further step costs the same whether it is the second or the sixtieth, so a few are enough to tell how much.
_SEVERAL_STEPS = 16
#: Rounds over all points; a measurement that something else disturbed is made good by the next.
_ROUNDS = 16


@dataclass(frozen=True, slots=True)
class Curve:
    """single: calls of one time step, several: calls of `steps` time steps; both by rows, ascending.

    A call of many rows never costs less than one of few, which could have been padded to it. Between two points cost
    is a straight line; past the last, proportional to the rows.
    """

    single: tuple[Point, ...]
    several: tuple[Point, ...] = ()
    steps: int = 1
    #: By rows, from 0: seconds of a call's first step, and of each further one.
    _first: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _further: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = np.arange(self.single[-1][0] + 1)
        first = _line(self.single, rows)
        if self.several and self.steps > 1:
            measured = [point[0] for point in self.several]
            more = (_line(self.several, np.array(measured)) - np.interp(measured, rows, first)) / (self.steps - 1)
            further = _line(tuple(zip(measured, np.maximum(more, 0.0).tolist(), strict=True)), rows)
        else:
            further = first
        object.__setattr__(self, "_first", tuple(first.tolist()))
        object.__setattr__(self, "_further", tuple(further.tolist()))

    @property
    def max_rows(self) -> int:
        """Rows of the largest call that was measured."""
        return len(self._first) - 1

    def seconds(self, rows: int, steps: int = 1) -> float:
        """Expected seconds of a call of `rows` rows, the longest `steps` steps long; both at least 1."""
        top = len(self._first) - 1
        if rows > top:
            return self.seconds(top, steps) * rows / top
        return self._first[rows] + (steps - 1) * self._further[rows]

    def best_rows(self, steps: int = 1) -> int:
        """Rows of the call in which a row costs least; of those within 3 % of it, the fewest."""
        each = [(rows, (self.seconds(rows, steps) + _TURN_SECONDS) / rows) for rows, _ in self.single]
        lowest = min(seconds for _, seconds in each)
        return next(rows for rows, seconds in each if seconds <= lowest * (1 + _WORTH_WAITING))

    def points(self) -> list[tuple[int, int, float]]:
        """(rows, steps, seconds) of every call that was measured."""
        return [(rows, 1, seconds) for rows, seconds in self.single] + [
            (rows, self.steps, seconds) for rows, seconds in self.several
        ]


def measure(
    run: Callable[[int, int], object],
    max_batch: int,
    piece_steps: int,
    max_batch_steps: int,
    budget_seconds: float = 0.15,
    now: Callable[[], float] = perf_counter,
) -> Curve:
    """The cost of `run(rows, steps)`: the least of several calls of each size, as many as the budget has room for.

    One row and `max_batch` rows are always measured, whatever they cost, other sizes as far as the budget goes. What
    `run` raises is raised. max_batch_steps: rows times steps in a call. now: seconds.
    """
    steps = min(piece_steps, _SEVERAL_STEPS)
    best: dict[tuple[int, int], float] = {}
    started = now()

    def room_for(size: tuple[int, int]) -> bool:
        return now() - started + _estimate(best, size) <= budget_seconds

    for round_ in range(_ROUNDS):
        for size in _sizes(max_batch, steps, min(max_batch, max(1, max_batch_steps // piece_steps))):
            needed = round_ == 0 and size in ((1, 1), (max_batch, 1))
            if not needed and not (room_for(size) and (round_ == 0 or size in best)):
                continue
            before = now()
            run(*size)
            best[size] = min(best.get(size, float("inf")), now() - before)
    return Curve(_points(best, 1), _points(best, steps) if steps > 1 else (), steps)


def _sizes(max_batch: int, steps: int, long_rows: int) -> list[tuple[int, int]]:
    """(rows, steps) to measure: first what must be known, then powers of two, then what lies between them."""
    powers = [2**i for i in range(1, max_batch.bit_length()) if 2**i < max_batch]
    between = [3 * power // 2 for power in powers[1:] if 3 * power // 2 < max_batch]
    single = dict.fromkeys([1, max_batch, *powers])
    long = sorted({1, *(rows for rows in (4, 16) if rows < long_rows), long_rows})
    several = [(rows, steps) for rows in long] if steps > 1 else []
    return [(rows, 1) for rows in single] + several + [(rows, 1) for rows in between]


def _estimate(best: dict[tuple[int, int], float], size: tuple[int, int]) -> float:
    """Seconds a call will take at most, from what is known of it or of smaller ones."""
    if size in best:
        return best[size]
    rows, steps = size
    smaller = [(r * s, seconds) for (r, s), seconds in best.items() if r <= rows and s <= steps]
    area, seconds = max(smaller, default=(1, 0.0))
    return seconds * rows * steps / area


def _points(best: dict[tuple[int, int], float], steps: int) -> tuple[Point, ...]:
    """Ascending, and never less for more rows: what cost more than a larger call was disturbed, or can be padded."""
    points: list[Point] = []
    ceiling = float("inf")
    for rows, seconds in sorted(((r, seconds) for (r, s), seconds in best.items() if s == steps), reverse=True):
        ceiling = min(ceiling, seconds)
        points.append((rows, ceiling))
    return tuple(reversed(points))


def _line(points: Sequence[Point], rows: np.ndarray) -> np.ndarray:
    """Seconds at each of `rows`: straight between the points, proportional past the last."""
    known, seconds = np.array(points, np.float64).T
    return np.interp(rows, known, seconds) * np.maximum(rows / known[-1], 1.0)
