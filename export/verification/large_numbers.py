"""Finds large numbers in the user's code: its behaviour may change once a sequence reaches their length.

Forward runs, and every pure expression of the code that ran is evaluated again from its source. This finds literals,
attributes and lengths of tables. Only a run over that many steps shows whether a number matters.
"""

import ast
import cProfile
import linecache
import math
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

from unroll.export.verification.expressions import is_pure
from unroll.export.verification.iterations import Place, is_foreign

#: Functions that stop after a given number of steps.
_ENDING = {"range", "islice", "deque", "zip", "repeat", "narrow", "split", "chunk", "unfold"}

#: Methods that pick from a table.
_PICKING = {"select", "narrow", "index_select", "gather", "take"}

#: Larger than any sequence: such a number stands for "no limit".
_LONGEST = 2**46

#: Collections of at most this size are searched for numbers.
_FEW = 16


@dataclass(frozen=True, slots=True)
class LargeNumber:
    """A number and its place in the code.

    `ends` is true if the code indexes, cuts or counts with it: then it has an effect without any branch.
    """

    value: int
    place: Place
    ends: bool


def find_large_numbers(runs: list[Callable[[], Any]], above: int) -> list[LargeNumber]:
    """Find numbers greater than `above` that do not depend on the sequence length.

    Args:
        runs: run forward over sequences of different lengths.
    """
    found = [_observed(run, above) for run in runs]
    same = set.intersection(*({number.value for number in each} for each in found))
    return sorted(
        (each for each in found[0] if each.value in same),
        key=lambda each: (each.value, each.ends, each.place.file, -each.place.line),
    )


def _observed(run: Callable[[], Any], above: int) -> set[LargeNumber]:
    found: set[LargeNumber] = set()
    seen: set[CodeType] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "return" and code not in seen and not is_foreign(code):
            seen.add(code)
            found.update(_numbers_in(frame, above))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(before if callable(before) else None)
        if isinstance(before, cProfile.Profile):  # a caller's profiler; `setprofile` takes functions only
            before.enable()
    return found


def _numbers_in(frame: FrameType, above: int) -> Iterator[LargeNumber]:
    code = frame.f_code
    expressions = _expressions(code)
    if not expressions:  # no source
        for value in _constants(code):
            yield from _large(value, False, above, Place(code.co_filename, code.co_firstlineno, ()), True)
    names = dict(frame.f_locals)
    for line, compiled, is_table, ends in expressions:
        try:
            value = eval(compiled, frame.f_globals, names)  # noqa: S307 the code that export runs anyway
        except Exception:  # noqa: BLE001, S112 user code; a name may be undefined here
            continue
        yield from _large(value, is_table, above, Place(code.co_filename, line, ()), ends or is_table)


def _large(value: Any, is_table: bool, above: int, place: Place, ends: bool) -> Iterator[LargeNumber]:
    for number in _sizes(value, is_table):
        if above < abs(number) <= _LONGEST:
            yield LargeNumber(math.ceil(abs(number)), place, ends)


def _sizes(value: Any, is_table: bool) -> Iterator[float]:
    """The numbers in a value: itself, its elements, its length or its capacity."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, Tensor):
        yield from value.shape if is_table else ()
        yield from value.flatten().tolist() if value.numel() <= _FEW and not value.is_complex() else ()
    elif isinstance(value, (list, tuple, dict, set, deque, range, nn.ModuleList, nn.ParameterList)):
        yield len(value)
        yield getattr(value, "maxlen", None) or 0
        if len(value) <= _FEW:
            yield from (each for each in value if isinstance(each, (int, float)))
    elif isinstance(value, slice):
        yield from (each for each in (value.start, value.stop) if isinstance(each, int))
    elif hasattr(value, "__length_hint__"):
        yield operator.length_hint(value)


def _constants(code: CodeType) -> Iterator[Any]:
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _constants(each)
        else:
            yield each


@cache
def _expressions(code: CodeType) -> list[tuple[int, CodeType, bool, bool]]:
    """The pure expressions of a code object: line, compiled code, whether it is indexed, whether it ends something."""
    places = [place for place in code.co_positions() if None not in place and place[2:] != (0, 0)]
    if not places:
        return []
    begin = min((line or 0, column or 0) for line, _, column, _ in places)
    end = max((line or 0, column or 0) for _, line, _, column in places)
    return [
        (node.lineno, compile(ast.Expression(node), code.co_filename, "eval"), is_table, ends)
        for node, is_table, ends in _pure_expressions(code.co_filename)
        if begin <= (node.lineno, node.col_offset) and (node.end_lineno or 0, node.end_col_offset or 0) <= end
    ]


@cache
def _pure_expressions(file: str) -> list[tuple[ast.expr, bool, bool]]:
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return []
    ends: set[int] = set()
    tables: set[int] = set()
    shown: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and _prints_only(node):
            shown |= {id(each) for each in ast.walk(node)}
        elif isinstance(node, ast.Subscript):
            tables.add(id(node.value))
            ends |= {id(each) for each in ast.walk(node.slice)}
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in _PICKING:
                tables.add(id(node.func.value))
            if _called(node) in _ENDING:
                ends |= {id(each) for argument in (*node.args, *node.keywords) for each in ast.walk(argument)}
    return [
        (node, id(node) in tables, id(node) in ends)
        for node in ast.walk(tree)
        if isinstance(node, ast.expr) and not isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))
        if not isinstance(node, ast.Slice) and id(node) not in shown and is_pure(node)
    ]


def _prints_only(branch: ast.If) -> bool:
    """Does the branch only print? `branches.py` checks that the name `print` is the builtin."""
    return not branch.orelse and all(
        isinstance(each, ast.Expr) and isinstance(each.value, ast.Call) and _called(each.value) == "print"
        for each in branch.body
    )


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
