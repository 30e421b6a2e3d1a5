"""Data-dependent branches where one arm computes the same as both: `if done.any(): h = h * (1 - done)`.

`decide` runs forward on many inputs, including extreme ones and values around the constants in its code. If forcing a
condition to one arm never changes the answers, export keeps that arm, and a graph can represent it. Every condition
must have been seen to go both ways: one that never did could hide what the other conditions skip. An arm that only
raises is never kept.
"""

import ast
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice, product
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from unroll.export.errors import ExportError
from unroll.export.lifting.dataflow import Observer
from unroll.export.lifting.float64 import double_precision
from unroll.export.loading.copies import detached_copy
from unroll.export.signature.outputs import leaves
from unroll.export.source_lines import is_users, shown, statement_at

#: A condition: its code object, line and instruction offset; `a.any() and b.any()` is two conditions.
Site = tuple[CodeType, int, int]

#: Tolerances in float64, since the other arm may compute in another order: relative to each element, and (smaller)
#: relative to the largest element of the tensor.
_CLOSE, _CLOSE_TO_LARGEST = 1e-9, 1e-13

#: The most combinations of arms to try, and the most conditions in one call: a forced arm may loop forever.
_MOST, _MOST_MET = 8, 10_000

#: The number of trials that mix variants across inputs, and the most constants taken from the code.
_MIXED, _NUMBERS = 8, 16

_Variant = Callable[[Tensor], Tensor]


def _every_fifth(x: Tensor) -> Tensor:
    return (torch.arange(x.numel()) % 5 == 2).view(x.shape)


def _times(number: float) -> _Variant:
    return lambda x: number * x if x.is_floating_point() else x


def _with(number: float) -> _Variant:
    return lambda x: torch.where(_every_fifth(x), torch.full_like(x, number), x)


def _every_other(axis: int) -> _Variant:
    """Zero every other row or time step."""
    return lambda x: x * (torch.arange(x.shape[axis]) % 2).to(x.dtype).view(-1, *[1] * (x.dim() - 1 - axis))


_VARIANTS: list[_Variant] = [
    lambda x: x,
    torch.zeros_like,
    torch.ones_like,
    lambda x: _every_fifth(x).to(x.dtype),
    _every_other(0),
    _every_other(1),
    *map(_times, (-100, *(10.0**power for power in (-6, -2, 1, 2, 3, 4, 6, 9)))),
]


@dataclass
class Undecided:
    """The conditions that were not decided.

    Attributes:
        varied: conditions that some inputs make go another way than the example does.
        constant: conditions that went one way for every input tried, with that way.
    """

    varied: list[Site] = field(default_factory=list)
    constant: dict[Site, bool] = field(default_factory=dict)


class Decided(Observer):
    """A mode that forces the conditions in `ways`, and records in `seen` which ways all other conditions go.

    Args:
        ways: the forced conditions.
        most: how many conditions one call may evaluate before it raises; None for no limit.
    """

    _as_written = False

    def __init__(self, ways: dict[Site, bool], most: int | None = None) -> None:
        super().__init__()
        self.ways, self.seen = ways, dict[Site, set[bool]]()
        self._left = self._most = most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__bool__ or self._as_written:
            return func(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame.f_code.co_name == "__torch_function__" and frame.f_back:  # skip the modes above this one
            frame = frame.f_back
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise RuntimeError("forward does not end")
        site = frame.f_code, frame.f_lineno, frame.f_lasti
        if site in self.ways:
            return self.ways[site]
        result = func(*args)
        if is_users(frame.f_code.co_filename):
            self.seen.setdefault(site, set()).add(result)
        return result

    def renew(self) -> None:
        """Reset the limit before another call."""
        self._left = self._most

    @classmethod
    @contextmanager
    def as_written(cls) -> Iterator[None]:
        """Evaluate conditions as written, without forcing any."""
        before, cls._as_written = cls._as_written, True
        try:
            yield
        finally:
            cls._as_written = before


def decide(exact: nn.Module, example: dict[str, Any]) -> tuple[dict[Site, bool], Undecided]:
    """Find the conditions that can be forced to one way for all inputs.

    Args:
        exact: the user's own model in float64; not modified.
        example: the example inputs.

    Returns:
        The forced way of each condition, and the conditions that stay undecided.
    """
    watch = Decided({})
    inputs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, example)
    with suppress(Exception):
        _answers(exact, inputs, watch)
    if not watch.seen:
        return {}, Undecided()
    usual, expected = {site: set(seen) for site, seen in watch.seen.items()}, []
    for given in _tried(inputs, _numbers(watch)):
        with suppress(Exception):
            expected.append((given, _answers(exact, given, watch)))
    choices = [_ways(site, seen) for site, seen in watch.seen.items()]
    for ways in islice(product(*choices), _MOST):
        decided = {site: way for site, way in zip(watch.seen, ways, strict=True) if way is not None}
        met = Decided(decided, _MOST_MET)
        with suppress(Exception):
            same = bool(decided) and all(_is_same(exact, given, met, own) for given, own in expected)
            if same and watch.seen.keys() <= decided.keys() | met.seen.keys():
                return decided, Undecided()
    varied = [site for site, seen in watch.seen.items() if seen != usual.get(site, seen)]
    constant = {site: next(iter(seen)) for site, seen in watch.seen.items() if len(seen) == 1 and site not in varied}
    return {}, Undecided(varied, constant)


def _is_same(exact: nn.Module, given: dict[str, Any], decided: Decided, own: list[Tensor]) -> bool:
    decided.renew()
    return _is_close(_answers(exact, given, decided), own)


def _numbers(watch: Decided) -> list[float]:
    """Possible thresholds: the constants of the code that holds the conditions."""
    found = {
        float(each)
        for code in {site[0] for site in watch.seen}
        for each in code.co_consts
        if isinstance(each, (int, float)) and each not in (0, 1)
    }
    return sorted(found)[:_NUMBERS]


def _tried(inputs: dict[str, Any], numbers: list[float]) -> Iterator[dict[str, Any]]:
    """Trial inputs: one input varied at a time, all inputs varied alike, and random mixtures."""
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    variants = [*_VARIANTS, *(_with(times * n) for n in numbers for times in (1, 1.1, -1.1))]
    rng = random.Random(0)  # noqa: S311 no secret
    chosen = [{name: variant} for variant in variants for name in names]
    if len(names) > 1:
        chosen += [dict.fromkeys(names, variant) for variant in variants]
        chosen += [{name: rng.choice(variants) for name in names} for _ in range(_MIXED)]
    for each in chosen:
        with suppress(Exception):
            yield inputs | {name: variant(inputs[name]) for name, variant in each.items()}


def _answers(exact: nn.Module, given: dict[str, Any], mode: Decided) -> list[Tensor]:
    with torch.no_grad(), double_precision(), mode:
        return [
            tensor for _, tensor in leaves(detached_copy(exact)(**pytree.tree_map_only(Tensor, torch.clone, given)))
        ]


def _is_close(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(_is_close_to, one, other))


def _is_close_to(one: Tensor, other: Tensor) -> bool:
    one, other = one.double(), other.double()
    largest = float(other.nan_to_num(0, 0, 0).abs().max()) if other.numel() else 0.0
    close = max(_CLOSE, _CLOSE_TO_LARGEST * largest)
    return one.shape == other.shape and torch.allclose(one, other, _CLOSE, close, equal_nan=True)


def _ways(site: Site, seen: set[bool]) -> list[bool | None]:
    """The ways to try for a condition; `[None]` if it went only one way and the other does not just raise."""
    if len(seen) == 2:
        return [True, False]
    statement = statement_at(site[0].co_filename, site[1])
    (way,) = seen
    raises = isinstance(statement, ast.Assert) or (
        isinstance(statement, ast.If) and all(isinstance(one, ast.Raise) for one in statement.body) and not way
    )
    return [way] if raises else [None]


def check(undecided: Undecided) -> None:
    """Raise ExportError(not_exportable) if a condition varied: the trace of a loop may have kept only one arm."""
    for code, line, _ in undecided.varied:
        raise ExportError(
            "not_exportable",
            f"forward branches on the value of a tensor at {shown(code.co_filename)}:{line}, but a graph runs the same "
            "operations for every input: select row by row with torch.where(condition, a, b)",
        )


def notes_on_ways(ways: dict[Site, bool], undecided: Undecided) -> list[str]:
    """Notes for the export report."""
    found = [
        (ways, "forward answers the same either way, or raises the other way"),
        (undecided.constant, "no tested input changes it; use torch.where if one can"),
    ]
    return [
        f"the bundle always takes one branch at {shown(code.co_filename)}:{line}, as if its condition were {way}: {why}"
        for sites, why in found
        for (code, line, _), way in sites.items()
    ]
