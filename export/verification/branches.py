"""Branches of the user's code that may go the other way later: on a number that grows with the steps or the length.

A trace of the bytecode shows which numbers each condition reads, and which way it goes.
"""

import dis
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FrameType
from typing import Any

from torch import Tensor

from unroll.export.verification.iterations import is_foreign

#: Code that only raises is no other way to go.
_ENDS = ("RETURN", "JUMP", "FOR_ITER", "STORE")

#: A condition begins after one of these at the latest.
_BEFORE = ("RETURN", "JUMP", "FOR_ITER", "STORE", "POP_TOP", "YIELD", "SEND", "RAISE", "RERAISE")


@dataclass(slots=True)
class Branch:
    """One condition. jumps: of it, as `while` has two. results: what it was. read: what it read, by run."""

    code: CodeType
    line: int
    jumps: set[dis.Instruction] = field(default_factory=set)
    results: set[bool] = field(default_factory=set)
    read: dict[int, set[Any]] = field(default_factory=dict)

    def went(self, jump: dis.Instruction, to: int) -> None:
        """After `jump` came the instruction at `to`."""
        jumped = abs(to - jump.argval) < abs(to - _after(self.code, jump.offset))
        self.results.add(jumped == _jumps_if(jump))

    def is_undecided(self) -> bool:
        """Did it read other numbers in one run than in another, and go one way only, where the other does not raise?"""
        if len(self.results) != 1 or len({frozenset(values) for values in self.read.values()}) < 2:
            return False
        (result,) = self.results
        others = [_after(self.code, jump.offset) if _jumps_if(jump) == result else jump.argval for jump in self.jumps]
        return not all(_raises(self.code, other) for other in others)


def _jumps_if(jump: dis.Instruction) -> bool:
    """The result for which it jumps."""
    return "TRUE" in jump.opname or jump.opname.endswith("IF_NONE")


class BranchLog:
    """Logs the branches of all code that is the user's. Each time that it runs is a run."""

    def __init__(self) -> None:
        self._branches: dict[tuple[CodeType, Any], Branch] = {}
        self._pending: dict[FrameType, tuple[Branch, dis.Instruction]] = {}
        self._runs = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        before = sys.gettrace()
        self._runs += 1
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)
            self._pending.clear()

    def undecided(self) -> list[Branch]:
        return [branch for branch in self._branches.values() if branch.is_undecided()]

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        if is_foreign(frame.f_code) or not _conditions(frame.f_code):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._step

    def _step(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            if frame in self._pending:
                branch, jump = self._pending.pop(frame)
                branch.went(jump, frame.f_lasti)
            if found := _conditions(frame.f_code).get(frame.f_lasti):
                jump, reads = found
                line = (jump.positions.lineno if jump.positions else None) or frame.f_lineno
                branch = self._branches.setdefault((frame.f_code, jump.positions), Branch(frame.f_code, line))
                branch.jumps.add(jump)
                branch.read.setdefault(self._runs, set()).add(tuple(_number(frame, *read) for read in reads))
                self._pending[frame] = branch, jump
        return self._step


#: A variable, whether its length is meant, and the axis of its shape that is.
_Read = tuple[str, bool, int | None]


def _number(frame: FrameType, name: str, length: bool, axis: int | None) -> Any:
    value: Any = frame.f_locals.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, Tensor):
        return value.shape[axis] if axis is not None and -value.dim() <= axis < value.dim() else None
    return len(value) if length and hasattr(value, "__len__") else None


@cache
def _conditions(code: CodeType) -> dict[int, tuple[dis.Instruction, tuple[_Read, ...]]]:
    """The conditional jumps by their offset, with what their condition reads."""
    found, before = {}, list[dis.Instruction]()
    for each in dis.get_instructions(code):
        if "JUMP" in each.opname and "_IF_" in each.opname and (reads := _reads(before)):
            found[each.offset] = each, reads
        before.append(each)
    return found


def _reads(before: list[dis.Instruction]) -> tuple[_Read, ...]:
    """The variables in the expression that these instructions end with."""
    wanted, start = 1, len(before)
    while wanted > 0 and start and not any(end in before[start - 1].opname for end in _BEFORE):
        start -= 1
        wanted -= dis.stack_effect(before[start].opcode, before[start].arg, jump=False)
    expression = before[start:]
    length = any(each.argval == "len" for each in expression)
    reads: list[_Read] = []
    for index, each in enumerate(expression):
        if each.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            names = each.argval if isinstance(each.argval, tuple) else (each.argval,)
            following = [one.argval for one in expression[index + 1 : index + 3]]
            shaped = len(following) == 2 and following[0] in {"shape", "size"} and isinstance(following[1], int)
            reads += [(name, length, following[1] if shaped else None) for name in names]
    return tuple(reads)


def _after(code: CodeType, offset: int) -> int:
    return next((each.offset for each in dis.get_instructions(code) if each.offset > offset), offset)


def _raises(code: CodeType, offset: int) -> bool:
    for each in dis.get_instructions(code):
        if each.offset >= offset and each.opname.startswith(("RAISE_VARARGS", *_ENDS)):
            return each.opname == "RAISE_VARARGS"
    return False
