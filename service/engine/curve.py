"""The cost of a model's call by its rows and steps: measured once at load, then looked up.

The cost of most models is nearly linear in the rows, but not from zero: one row may cost as much as twenty. It also has
jumps, since onnxruntime's kernels process about six rows at a time. The caller passes the call and the clock.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

#: (rows, seconds) of a call.
Point = tuple[int, float]
#: (rows, steps) of a call.
Size = tuple[int, int]

#: A larger call is worth its wait only if a row costs at least this share less in it.
_WORTH_WAITING = 0.03
#: Cost of a call in the loop and the scheduler.
_TURN_SECONDS = 20e-6
#: Steps of the calls that measure the cost of each step after the first, which is constant.
_SEVERAL_STEPS = 16
#: Rounds over all points; a later round corrects a measurement that other work disturbed.
_ROUNDS = 16
#: A point is known once this many of the lowest measurements differ by at most this share.
_AGREEING, _AGREE_WITHIN = 3, 0.1
#: Another model's curve is reused if the smallest and the largest call differ by at most this share.
_ALIKE_WITHIN = 0.25


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Curve:
    """The measured costs.

    More rows never cost less than fewer rows, which could have been padded. The cost is linear between two points and
    proportional to the rows after the last one.

    Attributes:
        single: Calls of one time step, by rows, ascending.
        several: Calls of `steps` time steps, by rows, ascending.
        steps: Time steps of the calls in `several`.
    """

    single: tuple[Point, ...]
    several: tuple[Point, ...] = ()
    steps: int = 1
    #: By rows, from 0: seconds of a call's first step, and of each further step.
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
        """Rows of the largest measured call."""
        return len(self._first) - 1

    def seconds(self, rows: int, steps: int = 1) -> float:
        """Return the expected seconds of a call of `rows` rows, the longest `steps` steps long; both at least 1."""
        top = len(self._first) - 1
        if rows > top:
            return self.seconds(top, steps) * rows / top
        return self._first[rows] + (steps - 1) * self._further[rows]

    def best_rows(self) -> int:
        """Return the fewest rows at which a row costs at most 3 % more than in the cheapest call."""
        each = [(rows, (self.seconds(rows) + _TURN_SECONDS) / rows) for rows, _ in self.single]
        lowest = min(seconds for _, seconds in each)
        return next(rows for rows, seconds in each if seconds <= lowest * (1 + _WORTH_WAITING))

    def points(self) -> list[tuple[int, int, float]]:
        """Return (rows, steps, seconds) of every measured call."""
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
    alike: Curve | None = None,
) -> Curve:
    """Measure the cost of calls: the minimum over several calls of each size, until they agree or the budget is spent.

    Args:
        run: `run(rows, steps)` makes a call; its exceptions propagate.
        max_batch: Rows of the largest call. It and the call of one row are always measured.
        piece_steps: Time steps of the longest call.
        max_batch_steps: Largest product of rows and steps in a call.
        alike: The curve of a model that seems to be built alike, within the same limits. It is returned if these two
            calls cost the same.
    """
    steps = min(piece_steps, _SEVERAL_STEPS)
    measured = _Measured(run, budget_seconds, now)
    ends = [*dict.fromkeys([(1, 1), (max_batch, 1)])]
    for size in ends:
        measured.take(size)
    if alike is not None and measured.agrees_with(alike, ends):
        return alike
    sizes = _sizes(max_batch, steps, min(max_batch, max(1, max_batch_steps // piece_steps)))
    for size in sizes:
        if size not in ends:
            measured.take_in_time(size)
    for size in sizes * (_ROUNDS - 1):
        if size in measured.best and not measured.is_known(size):
            measured.take_in_time(size)
    best = measured.best
    return Curve(_points(best, 1), _points(best, steps) if steps > 1 else (), steps)


class _Measured:
    """best: the lowest seconds of the calls of each size."""

    def __init__(self, run: Callable[[int, int], object], budget: float, now: Callable[[], float]) -> None:
        self.best: dict[Size, float] = {}
        self._lowest: dict[Size, list[float]] = {}
        self._run = run
        self._now = now
        self._until = now() + budget

    def take(self, size: Size) -> None:
        before = self._now()
        self._run(*size)
        self._lowest[size] = sorted([*self._lowest.get(size, []), self._now() - before])[:_AGREEING]
        self.best[size] = self._lowest[size][0]

    def take_in_time(self, size: Size) -> None:
        if self._now() + _estimate(self.best, size) <= self._until:
            self.take(size)

    def is_known(self, size: Size) -> bool:
        lowest = self._lowest[size]
        return len(lowest) == _AGREEING and lowest[-1] <= lowest[0] * (1 + _AGREE_WITHIN)

    def agrees_with(self, curve: Curve, sizes: Sequence[Size]) -> bool:
        """Repeat calls of these sizes until they agree with the curve, or the rounds are used up."""
        for _ in range(_ROUNDS):
            others = [size for size in sizes if abs(self.best[size] / curve.seconds(*size) - 1) > _ALIKE_WITHIN]
            for size in others:
                self.take_in_time(size)
            if not others:
                return True
        return False


def _sizes(max_batch: int, steps: int, long_rows: int) -> list[Size]:
    """Return (rows, steps) to measure: first the required sizes, then powers of two, then sizes between them."""
    powers = [2**i for i in range(1, max_batch.bit_length()) if 2**i < max_batch]
    between = [3 * power // 2 for power in powers[1:] if 3 * power // 2 < max_batch]
    single = dict.fromkeys([1, max_batch, *powers])
    long = sorted({1, *(rows for rows in (4, 16) if rows < long_rows), long_rows})
    several = [(rows, steps) for rows in long] if steps > 1 else []
    return [(rows, 1) for rows in single] + several + [(rows, 1) for rows in between]


def _estimate(best: dict[Size, float], size: Size) -> float:
    """Return the most seconds that a call will take, from earlier calls of this or a smaller size."""
    if size in best:
        return best[size]
    rows, steps = size
    smaller = [(r * s, seconds) for (r, s), seconds in best.items() if r <= rows and s <= steps]
    area, seconds = max(smaller, default=(1, 0.0))
    return seconds * rows * steps / area


def _points(best: dict[Size, float], steps: int) -> tuple[Point, ...]:
    """Return the points, ascending. One that cost more than a larger call gets the cost of that call."""
    points: list[Point] = []
    ceiling = float("inf")
    for rows, seconds in sorted(((r, seconds) for (r, s), seconds in best.items() if s == steps), reverse=True):
        ceiling = min(ceiling, seconds)
        points.append((rows, ceiling))
    return tuple(reversed(points))


def _line(points: Sequence[Point], rows: np.ndarray) -> np.ndarray:
    """Return seconds at each of `rows`: linear between the points, proportional after the last."""
    known, seconds = np.array(points, np.float64).T
    return np.interp(rows, known, seconds) * np.maximum(rows / known[-1], 1.0)
