"""Splits a forward that does more than loop over time into plain calls and separate modules for its loops.

Forward is recorded at several sizes. Calls that repeat once per time step form a loop. A program replays all other
calls, with sizes that are functions of batch and time, so these may include convolutions and recurrent layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from unroll.export.lifting.layers import LAYERS
from unroll.export.lifting.recording import CannotSplitError, Given, Made, Op, Recorder, Size, leaves_of, mapped
from unroll.export.lifting.replay import Piece, Program, Region, needed

#: The sizes to record.
BATCHES, TIMES = (2, 3), (1, 3, 5)


def find_loops(three: Sequence[Any], five: Sequence[Any]) -> list[tuple[int, int]] | None:
    """Find the loops in the calls over three and five time steps.

    Returns:
        For each loop, its start in the calls over three steps and the number of calls per step; None if the calls
        cannot be explained.
    """
    loops: list[tuple[int, int]] = []
    i = j = 0
    while i < len(three) or j < len(five):
        sizes = range(1, (len(three) - i) // 3 + 1)
        size = next(
            (
                n
                for n in sizes
                if _repeats(three, i, n, 3) and three[i : i + n] == five[j : j + n] and _repeats(five, j, n, 5)
            ),
            0,
        )
        if size:
            loops.append((i, size))
            i, j = i + 3 * size, j + 5 * size
        elif three[i : i + 1] == five[j : j + 1]:
            i, j = i + 1, j + 1
        else:
            return None
    return loops


def _repeats(keys: Sequence[Any], begin: int, size: int, times: int) -> bool:
    """Does the pattern of `size` calls at `begin` occur exactly `times` times in a row?"""
    one, whole = list(keys[begin : begin + size]), list(keys[begin : begin + size * times])
    return whole == one * times and list(keys[begin + size * times : begin + size * (times + 1)]) != one


@dataclass(frozen=True, slots=True)
class Series:
    """The results (or their item `item`) of call `offset` in loop `loop`, collected over all steps."""

    loop: int
    offset: int
    item: int | None


class Record:
    """One recorded forward, split into loops and the calls outside.

    Args:
        recorder: holds the recorded calls.
        returned: references to the results of forward.
        loops: the loops in a record of three time steps, as returned by `find_loops`.
        time: the number of time steps of this record.
    """

    def __init__(self, recorder: Recorder, returned: Any, loops: list[tuple[int, int]], time: int) -> None:
        self._ops, self._returned, self.recorder = recorder.ops, returned, recorder
        plain = [number for number, op in enumerate(self._ops) if not op.creates]
        self.spans: list[list[int]] = []
        before = 0
        for begin, size in loops:
            begin += before * (time - 3)
            self.spans.append(plain[begin : begin + size * time])
            before += size
        self._sizes = [size for _, size in loops]
        self._loop = {number: which for which, span in enumerate(self.spans) for number in span}
        #: The numbers of the calls outside of loops; their order is the same in all records.
        self.outside = [number for number in plain if number not in self._loop]
        self._tails: dict[int, int] = {}
        self._fans: set[int] = set()
        self._series: set[tuple[int, Series]] = set()
        self._results: list[dict[Any, Made | Series]] = [{} for _ in loops]
        self.values: list[tuple[list[Tensor], list[Tensor]]] = []

    def raw_spans(self) -> list[tuple[int, int]]:
        """Where each loop begins and ends, counting all recorded calls."""
        return [(self._ops[span[0]].raw, self._ops[span[-1]].raw + 1) for span in self.spans]

    def find_tails(self) -> dict[int, int]:
        """The calls outside that collect results from all steps of a loop, with that loop. Needs several time steps."""
        found = {}
        for place, number in enumerate(self.outside):
            made = [leaf.number for leaf in leaves_of(self._ops[number].args) if isinstance(leaf, Made)]
            early = {self._loop[n] for n in made if n in self._loop and not self._is_last(n)}
            if len(early) > 1:
                raise CannotSplitError("a call collects from two loops")
            if early:
                found[place] = early.pop()
        return found

    def find_series(self) -> set[tuple[int, Series]]:
        """The series that a loop reads step by step from another loop, each with the reading loop.

        Needs several time steps.
        """
        return {
            (which, self._series_of(leaf))
            for which, span in enumerate(self.spans)
            for number in span
            for leaf in leaves_of(self._ops[number].args)
            if isinstance(leaf, Made) and self._loop.get(leaf.number, which) != which and not self._is_last(leaf.number)
        }

    def _series_of(self, made: Made) -> Series:
        which = self._loop[made.number]
        return Series(which, self.spans[which].index(made.number) % self._sizes[which], made.item)

    def count_results(self) -> list[int]:
        return [
            len(result) if isinstance(result := self.recorder.results[number], (tuple, list)) else 0
            for number in self.outside
        ]

    def take_apart(
        self, tails: dict[int, int], fans: set[int], series: set[tuple[int, Series]]
    ) -> tuple[Program, list[Region]]:
        """Build the program and the region of each loop.

        Args:
            tails: indices of calls outside that collect from a loop, with that loop.
            fans: indices of calls outside that return a tensor per step.
            series: the series that loops read from each other, each with the reading loop.
        """
        self._series = series
        self._tails = {self.outside[place]: loop for place, loop in tails.items()}
        self._fans = {self.outside[place] for place in fans}
        ends = {span[-1]: which for which, span in enumerate(self.spans)}
        order = sorted([*self.outside, *ends])
        self._place = {number: place for place, number in enumerate(order)}
        regions: list[tuple[list[Any], list[Op], dict[int, int]]] = []
        items: list[Any] = []
        for number in order:
            if number in ends:
                regions.append(self._region(ends[number]))
                items.append((ends[number], [self._outer(reference) for reference in regions[-1][0]]))
            elif number in self._tails:
                items.append(None)
            else:
                op = self._ops[number]
                items.append(Op(op.function, mapped(op.args, self._outer)))
        program = Program(items, mapped(self._returned, self._outer))
        found = []
        for which, (arguments, ops, local) in enumerate(regions):
            results = []
            for result in self._results[which].values():
                if isinstance(result, Series):
                    made = [Made(local[each.number], each.item) for each in self._each(result)]
                    ops.append(Op(torch.stack, ((made, 1), {})))
                    results.append(Made(len(ops) - 1))
                else:
                    results.append(Made(local[result.number], result.item))
            found.append(Region(arguments, ops, results))
            given = [self._value(reference) for reference in arguments]
            self.values.append((given, [self._value(result) for result in self._results[which].values()]))
        return program, found

    def _each(self, series: Series) -> list[Made]:
        span = self.spans[series.loop][series.offset :: self._sizes[series.loop]]
        return [Made(number, series.item) for number in span]

    def _value(self, reference: Any) -> Tensor:
        if isinstance(reference, Given):
            return self.recorder.given[reference.index]
        if isinstance(reference, Series):
            return torch.stack([self.recorder.value(each) for each in self._each(reference)], 1)
        return self.recorder.value(reference)

    def _is_last(self, number: int) -> bool:
        which = self._loop[number]
        return number in self.spans[which][-self._sizes[which] :]

    def _outer(self, leaf: Any) -> Any:
        """Convert a reference to one that is equal in all records."""
        if isinstance(leaf, Series):
            return self._result(leaf.loop, leaf, leaf)
        if not isinstance(leaf, Made):
            return leaf
        op = self._ops[leaf.number]
        if op.creates:
            return Op(op.function, mapped(op.args, self._outer))
        which = self._loop.get(leaf.number, self._tails.get(leaf.number))
        if which is None:
            return Made(self._place[leaf.number], leaf.item)
        if leaf.number in self._loop and not self._is_last(leaf.number):
            raise CannotSplitError("what one of its steps made is used outside")
        return self._result(which, (leaf.number, leaf.item), leaf)

    def _result(self, which: int, key: Any, result: Made | Series) -> Made:
        """Make a value a result of a loop, and refer to it."""
        results = self._results[which]
        results.setdefault(key, result)
        return Made(self._place[self.spans[which][-1]], list(results).index(key))

    def _region(self, which: int) -> tuple[list[Any], list[Op], dict[int, int]]:
        arguments: list[Any] = []
        ops: list[Op] = []
        local: dict[int, int] = {}

        def inner(leaf: Any) -> Any:
            if isinstance(leaf, Made):
                op = self._ops[leaf.number]
                if op.creates:
                    return Op(op.function, mapped(op.args, inner))
                if leaf.number in local:
                    return Made(local[leaf.number], leaf.item)
                if self._loop.get(leaf.number, which) != which and (which, self._series_of(leaf)) in self._series:
                    return step_of(self._series_of(leaf), leaf)
            elif not isinstance(leaf, Given):
                return leaf
            if leaf not in arguments:
                arguments.append(leaf)
            return Given(arguments.index(leaf))

        def step_of(series: Series, made: Made) -> Made:
            return Made(unbound[series], self._each(series).index(made))

        def add(number: int) -> None:
            op = self._ops[number]
            converted = Op(op.function, mapped(op.args, inner))
            local[number] = len(ops)
            ops.append(converted)

        # Calls that return a tensor per step come before the first step.
        for number in sorted(self._taken(which) & self._fans):
            add(number)
        unbound: dict[Series, int] = {}
        for taker, series in sorted(self._series, key=repr):
            if taker == which:
                arguments.append(series)
                unbound[series] = len(ops)
                ops.append(Op(torch.unbind, ((Given(len(arguments) - 1), 1), {})))
        for number in self.spans[which]:
            add(number)
        for number, loop in self._tails.items():
            if loop == which:
                add(number)
        return arguments, ops, local

    def _taken(self, which: int) -> set[int]:
        """The calls that a loop takes results from, directly or to create a tensor of equal size."""
        left, found = list(self.spans[which]), set[int]()
        while left:
            made = [leaf.number for leaf in leaves_of(self._ops[left.pop()].args) if isinstance(leaf, Made)]
            found.update(made)
            left += [number for number in made if self._ops[number].creates]
        return found


Points = list[tuple[int, int]]


def merged(trees: list[Any], points: Points) -> Any:
    """Merge the trees recorded at several sizes; numbers that vary become functions of the size.

    Args:
        trees: one tree per size.
        points: the sizes (batch, time).

    Raises:
        CannotSplitError: if the trees differ in any other way.
    """
    first = trees[0]
    if any(type(tree) is not type(first) for tree in trees):
        raise CannotSplitError("its calls differ with the size")
    if isinstance(first, (tuple, list)):
        if any(len(tree) != len(first) for tree in trees):
            raise CannotSplitError("its calls differ with the size")
        items = [merged(list(column), points) for column in zip(*trees, strict=True)]
        return items if isinstance(first, list) else tuple(items)
    if isinstance(first, dict):
        if any(tree.keys() != first.keys() for tree in trees):
            raise CannotSplitError("its calls differ with the size")
        return {key: merged([tree[key] for tree in trees], points) for key in first}
    if isinstance(first, slice):
        return slice(*merged([(tree.start, tree.stop, tree.step) for tree in trees], points))
    if isinstance(first, Op):
        if any(tree.function != first.function for tree in trees):
            raise CannotSplitError("its calls differ with the size")
        return Op(first.function, merged([tree.args for tree in trees], points))
    if all(tree == first or repr(tree) == repr(first) for tree in trees):
        return first
    if isinstance(first, int) and not isinstance(first, bool):
        return _size(trees, points)
    raise CannotSplitError("a value in its calls differs with the size")


def _size(numbers: list[int], points: Points) -> Size:
    at = dict(zip(points, numbers, strict=True))
    (b0, t0), (b1, t1) = min(points), max(points)
    per_batch = (at[b1, t0] - at[b0, t0]) // (b1 - b0)
    per_time, both = 0, 0
    if t1 != t0:
        per_time = (at[b0, t1] - at[b0, t0]) // (t1 - t0)
        both = (at[b1, t1] - at[b1, t0] - at[b0, t1] + at[b0, t0]) // ((b1 - b0) * (t1 - t0))
    per_batch, per_time = per_batch - both * t0, per_time - both * b0
    size = Size(at[b0, t0] - per_batch * b0 - per_time * t0 - both * b0 * t0, per_batch, per_time, both)
    if any(size.at(*point) != number for point, number in at.items()):
        raise CannotSplitError("a number in its calls depends on the size in an unusual way")
    return size


@dataclass(frozen=True, slots=True)
class Split:
    """A forward split into a program and its loops.

    Attributes:
        program: the calls outside of loops.
        pieces: a module for each loop.
        gaps: the number of calls before, between and after the loops.
        sizes: the number of calls per step of each loop.
        values: the arguments and results of each loop, by size.
    """

    program: Program
    pieces: list[Piece]
    gaps: list[int]
    sizes: list[int]
    values: list[dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]]]


def split(module: nn.Module, calls: dict[tuple[int, int], tuple[list[Any], Any]], axes: Callable[..., Any]) -> Split:
    """Split the forward of `module`.

    Args:
        module: the module that loops.
        calls: its flat arguments and their structure, at every size.
        axes: locates batch and time in the tensors of three calls: base, another batch size, another length.

    Raises:
        CannotSplitError: if forward is not a distinguishable sequence of calls and loops.
    """
    layers = [path for path, inner in module.named_modules() if isinstance(inner, LAYERS)]
    for _ in range(2):
        recorded = {size: _recorded(module, *call, layers) for size, call in calls.items()}
        three, five = (recorded[2, time][0] for time in (3, 5))
        counts = [[sum(op.function == path for op in one.ops) for one in (three, five)] for path in layers]
        if all(one == other for one, other in counts):
            break
        layers = [path for path, (one, other) in zip(layers, counts, strict=True) if one == other]
    loops = None
    for part in (slice(None), slice(2), slice(1)):
        keys = [[op.key[part] for op in one.ops if not op.creates] for one in (three, five)]
        loops = loops or find_loops(*keys)
    if not loops:
        raise CannotSplitError("its time steps cannot be told apart")
    records = {size: Record(*one, loops, size[1]) for size, one in recorded.items()}
    base, longer = records[2, 3], records[2, 5]
    if len({len(record.outside) for record in records.values()}) > 1:
        raise CannotSplitError("its calls differ with the size")
    tails = base.find_tails()
    pairs = zip(base.count_results(), longer.count_results(), strict=True)
    fans = {place for place, (one, other) in enumerate(pairs) if one != other}
    series = base.find_series()
    apart = {size: record.take_apart(tails, fans, series) for size, record in records.items()}
    points, programs = list(apart), [program for program, _ in apart.values()]
    wanted = needed(programs[points.index((2, 3))])
    items = [[item if place in wanted else None for place, item in enumerate(one.items)] for one in programs]
    program = Program(merged(items, points), merged([one.returned for one in programs], points))
    pieces, values = [], []
    for which in range(len(loops)):
        regions = {}
        for time in TIMES:
            pair = [apart[batch, time][1][which] for batch in BATCHES]
            ops = merged([one.ops for one in pair], [(batch, time) for batch in BATCHES])
            if pair[0].results != pair[1].results:
                raise CannotSplitError("its calls differ with the size")
            regions[time] = Region([], ops, pair[0].results)
        values.append({size: record.values[which] for size, record in records.items()})
        place = axes(*(values[-1][size][0] for size in ((2, 3), (3, 3), (2, 5))))
        pieces.append(Piece(module, regions, *place))
    return Split(program, pieces, *_raw(records), values)


def _recorded(module: nn.Module, given: list[Any], structure: Any, layers: list[str]) -> tuple[Recorder, Any]:
    recorder = Recorder(module, given, layers)
    args, kwargs = pytree.tree_unflatten(given, structure)
    return recorder, recorder.run(args, kwargs)


def _raw(records: dict[tuple[int, int], Record]) -> tuple[list[int], list[int]]:
    """The gaps and sizes of `Split`, counting all calls, as a log of the whole forward does."""
    ranges = [records[2, time].raw_spans() for time in (3, 5)]
    sizes = [((e5 - b5) - (e3 - b3)) // 2 for (b3, e3), (b5, e5) in zip(*ranges, strict=True)]
    ends = [0, *(end for _, end in ranges[0])]
    begins = [*(begin for begin, _ in ranges[0]), records[2, 3].recorder.raw]
    gaps = [begin - end for begin, end in zip(begins, ends, strict=True)]
    for which, ((begin, end), size) in enumerate(zip(ranges[0], sizes, strict=True)):
        gaps[which] += end - begin - 3 * size
    return gaps, sizes
