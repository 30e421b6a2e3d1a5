"""Branches by the value of a tensor of which one way does what both do: `if done.any(): h = h * (1 - done)`.

Forward is run with inputs that make such a condition go both ways. If it answers the same where the condition always
goes one way, it goes that way from then on, and a graph can follow. A way that only raises is never taken.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from unroll.export.lifting.dataflow import Observer
from unroll.export.lifting.float64 import double_precision
from unroll.export.loading.copies import detached_copy
from unroll.export.signature.outputs import leaves
from unroll.export.source_lines import is_users, shown, statement_at

#: File and line of a condition.
Line = tuple[str, int]

#: Of float64: another way may compute in another order.
_CLOSE = 1e-9

#: Ways of several conditions that are tried together.
_MOST = 8

_VARIANTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    torch.zeros_like,
    torch.ones_like,
    lambda x: -100 * x if x.is_floating_point() else x,
    lambda x: (torch.arange(x.numel()) % 5 == 2).view(x.shape).to(x.dtype),
]


class Decided(Observer):
    """Within, the conditions at these lines go the way that they have here; `seen` are the ways of all others."""

    _undone = False

    def __init__(self, ways: dict[Line, bool]) -> None:
        super().__init__()
        self.ways, self.seen = ways, dict[Line, set[bool]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__bool__ or self._undone:
            return func(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame.f_code.co_name == "__torch_function__" and frame.f_back:  # of modes above this one
            frame = frame.f_back
        line = frame.f_code.co_filename, frame.f_lineno
        if line in self.ways:
            return self.ways[line]
        result = func(*args)
        if is_users(line[0]):
            self.seen.setdefault(line, set()).add(result)
        return result

    @classmethod
    @contextmanager
    def undone(cls) -> Iterator[None]:
        """Within, conditions go as forward has written them."""
        before, cls._undone = cls._undone, True
        try:
            yield
        finally:
            cls._undone = before


def decide(exact: nn.Module, example: dict[str, Any]) -> dict[Line, bool]:
    """The conditions that may go one way whatever the inputs are, and that way.

    Args:
        exact: the user's own model, in float64; not changed.
    """
    watch = Decided({})
    inputs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, example)
    with suppress(Exception):
        _answers(exact, inputs, watch)
    if not watch.seen:
        return {}
    tried = [inputs | {name: v(x)} for name, x in inputs.items() if isinstance(x, Tensor) for v in _VARIANTS]
    expected = []
    for given in tried:
        with suppress(Exception):
            expected.append((given, _answers(exact, given, watch)))
    choices = [_ways(line, seen) for line, seen in watch.seen.items()]
    for ways in islice(product(*choices), _MOST):
        decided = {line: way for line, way in zip(watch.seen, ways, strict=True) if way is not None}
        with suppress(Exception):
            if decided and all(_is_close(_answers(exact, given, Decided(decided)), own) for given, own in expected):
                return decided
    return {}


def _answers(exact: nn.Module, given: dict[str, Any], mode: Decided) -> list[Tensor]:
    with torch.no_grad(), double_precision(), mode:
        return [
            tensor for _, tensor in leaves(detached_copy(exact)(**pytree.tree_map_only(Tensor, torch.clone, given)))
        ]


def _is_close(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), _CLOSE, _CLOSE)
        for a, b in zip(one, other, strict=True)
    )


def _ways(line: Line, seen: set[bool]) -> list[bool | None]:
    """The ways that a condition may be made to go; None alone where it was never seen to go the other way."""
    if len(seen) == 2:
        return [True, False]
    statement = statement_at(*line)
    (way,) = seen
    raises = isinstance(statement, ast.Assert) or (
        isinstance(statement, ast.If) and all(isinstance(one, ast.Raise) for one in statement.body) and not way
    )
    return [way] if raises else [None]


def notes_on_ways(ways: dict[Line, bool]) -> list[str]:
    """For the report on an export."""
    return [
        f"the bundle goes one way at {shown(file)}:{line}, as if its condition were {way}: forward answers the same "
        "either way, or raises the other way"
        for (file, line), way in ways.items()
    ]
