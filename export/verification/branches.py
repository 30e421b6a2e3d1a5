"""Finds user code whose behaviour may change later, because it depends on a number that grows with the steps or length.

A bytecode trace records which numbers each condition reads, and which branch it takes. Results that are not linear in
such numbers, as of `min` or `%`, are recomputed from the source.
"""

import dis
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FrameType
from typing import Any

from torch import Tensor

from unroll.export.verification.expressions import COMPUTING, Expression, says_only
from unroll.export.verification.iterations import is_foreign

#: An arm that reaches a raise before any of these only raises, and does not count as a branch.
_ENDS = ("RETURN", "JUMP", "FOR_ITER", "STORE")

#: An expression starts after the last of these, at the latest.
_BEFORE = ("RETURN", "JUMP", "FOR_ITER", "STORE", "POP_TOP", "YIELD", "SEND", "RAISE", "RERAISE")

#: Instructions that compute nothing.
_NOTHING = {"CACHE", "PRECALL", "EXTENDED_ARG", "TO_BOOL", "NOT_TAKEN", "NOP", "RESUME"}

#: Executions of a site in one run, after which it counts as late: behaviour special to the first steps is over.
_SETTLED = 5

#: The values of the variables that a site reads.
_Values = tuple[Any, ...]


@dataclass(slots=True)
class Site:
    """A place in the code that reads numbers.

    Attributes:
        read: the values it read, by run.
        times: how often it executed in the last run.
    """

    code: CodeType
    line: int
    read: dict[int, set[_Values]] = field(default_factory=dict)
    times: int = 0

    def reads(self, run: int, values: _Values) -> None:
        self.times = self.times + 1 if run in self.read else 1
        self.read.setdefault(run, set()).add(values)

    @property
    def is_late(self) -> bool:
        return self.times > _SETTLED

    def grows(self) -> bool:
        """Did it read different numbers in different runs?"""
        return len({frozenset(values) for values in self.read.values()}) > 1


@dataclass(slots=True)
class Branch(Site):
    """One condition.

    Attributes:
        expression: the instructions that compute the condition.
        names: the frame of its last evaluation.
        jumps: its jumps by offset; a `while` has two.
        results, late: the condition's values, and those after the first steps.
    """

    expression: tuple[dis.Instruction, ...] = ()
    names: FrameType | None = None
    jumps: dict[int, dis.Instruction] = field(default_factory=dict)
    results: set[bool] = field(default_factory=set)
    late: set[bool] = field(default_factory=set)

    def went(self, jump: dis.Instruction, to: int) -> None:
        """Record that execution continued at offset `to` after `jump`."""
        jumped = abs(to - jump.argval) < abs(to - _after(self.code, jump.offset))
        self.results.add(jumped == _jumps_if(jump))
        if self.is_late:
            self.late.add(jumped == _jumps_if(jump))

    def is_undecided(self) -> bool:
        """Does it read growing numbers and always go one way, although the other arm does something else?"""
        whole = self.expression
        recurs = any(_computes(each, whole) for each in whole if each.opname != "COMPARE_OP")
        results = (self.late if recurs else None) or self.results
        if len(results) != 1 or not self.grows() or _is_final(self, whole, *results):
            return False
        (result,) = results
        others = [
            _after(self.code, jump.offset) if _jumps_if(jump) == result else jump.argval for jump in self.jumps.values()
        ]
        if all(_raises(self.code, other) for other in others):
            return False
        arms = [_arm(self.code, jump) for jump in self.jumps.values()]
        return not (self.names and all(arm is not None and says_only(arm, self.names) for arm in arms))


@dataclass(slots=True)
class Use(Site):
    """A number computed from other numbers.

    Attributes:
        expression: the computation; None if it involves more than numbers.
        made: for each evaluation, the values read, the result, and whether the site was late.
    """

    expression: Expression | None = None
    instructions: tuple[dis.Instruction, ...] = ()
    made: list[tuple[_Values, Any, bool]] = field(default_factory=list)

    def makes(self, values: _Values, result: Any) -> None:
        self.made.append((values, result, self.is_late))

    def is_undecided(self) -> bool:
        """Has it followed one rule over growing numbers so far, but might follow another later?"""
        if self.expression is None or not self.grows():
            return False
        if self.expression.code is None:
            return True
        late = [(values, result) for values, result, is_late in self.made if is_late or self.expression.is_threshold]
        pairs = late or [(values, result) for values, result, _ in self.made]
        results = {result for _, result in pairs}
        if not all(isinstance(result, (bool, int, float)) for result in results):
            return False  # tensors are covered by the log of operations
        if len(results) == 1:
            return not _is_final(self, self.instructions, *results)
        return not self.expression.rounds and _is_even(pairs)


def _is_even(pairs: list[tuple[_Values, Any]]) -> bool:
    """Is the result linear in one of the numbers?"""
    for index in range(len(pairs[0][0])):
        points = sorted(
            {(values[index], result) for values, result in pairs if isinstance(values[index], (int, float))}
        )
        if len(points) > 1 and points[0][0] != points[1][0]:
            (x, y), (other, then) = points[0], points[-1]
            if all((result - y) * (other - x) == (then - y) * (value - x) for value, result in points):
                return True
    return False


def _is_final(site: Site, expression: tuple[dis.Instruction, ...], result: bool) -> bool:
    """Is it a condition like `t >= 0`, which stays the same as the number grows?"""
    parts = [each for each in expression if each.opname not in _NOTHING]
    columns = iter(zip(*(values for run in site.read.values() for values in run), strict=True))
    sides: list[tuple[Any, ...]] = []
    for each in parts[:-1]:
        names = each.argval if isinstance(each.argval, tuple) else (each.argval,)
        sides += [(each.argval,)] if _kind(each) == "number" else [next(columns, ()) for _ in names]
    sign = next(iter(re.findall(r"[<>=!]+", parts[-1].argrepr)), "")
    if not sign or {_kind(each) for each in parts[:-1]} - {"name", "number"} or len(sides) < 2:
        return False
    sides = sides[-2:]  # one instruction may load two variables but compare only one
    fixed = next((index for index, side in enumerate(sides) if len(set(side)) == 1), 0)
    (number, *_), values = sides[fixed], sides[1 - fixed]
    if not all(isinstance(value, (int, float)) and value >= max(number, 0) for value in values):
        return False
    rises = (">" if fixed == 1 else "<") in sign
    return result == (rises or sign == "!=") and (rises or "=" not in sign or number not in values)


class BranchLog:
    """Logs the branches of all user code, separately for each `running` block."""

    def __init__(self) -> None:
        self._branches: dict[tuple[CodeType, Any], Branch] = {}
        self._uses: dict[tuple[CodeType, int], Use] = {}
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

    def undecided(self) -> list[Branch | Use]:
        sites: list[Branch | Use] = [*self._branches.values(), *self._uses.values()]
        return [site for site in sites if site.is_undecided()]

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        if is_foreign(frame.f_code) or not _watched(frame.f_code):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._step

    def _step(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            if frame in self._pending:
                branch, jump = self._pending.pop(frame)
                branch.went(jump, frame.f_lasti)
            if found := _watched(frame.f_code).get(frame.f_lasti):
                values = tuple(_number(frame, *read) for read in found.reads)
                if found.branches:
                    self._at_branch(frame, found, values)
                else:
                    self._at_use(frame, found, values)
        return self._step

    def _at_branch(self, frame: FrameType, found: "_Watched", values: _Values) -> None:
        jump, code = found.instruction, frame.f_code
        key = code, jump.positions
        if key not in self._branches:
            self._branches[key] = Branch(code, _line(jump, frame), expression=found.expression)
        branch = self._branches[key]
        branch.names = frame
        branch.jumps[jump.offset] = jump
        branch.reads(self._runs, values)
        self._pending[frame] = branch, jump

    def _at_use(self, frame: FrameType, found: "_Watched", values: _Values) -> None:
        code, instruction = frame.f_code, found.instruction
        key = code, instruction.offset
        if key not in self._uses:
            self._uses[key] = Use(code, _line(instruction, frame), instructions=(*found.expression, instruction))
            self._uses[key].expression = Expression.of(code, instruction)
        use = self._uses[key]
        use.reads(self._runs, values)
        if use.expression:
            use.makes(values, use.expression.value(frame))


@cache
def is_readable() -> bool:
    """Does this module understand the bytecode of this Python? Tried on a loop with one undecided branch."""
    names: dict[str, Any] = {}
    exec(compile("def loop(n):\n for t in range(n):\n  if t > 99: n = 0\n", "<loop>", "exec"), names)  # noqa: S102 a constant
    log = BranchLog()
    try:
        for steps in (2, 3):
            with log.running():
                names["loop"](steps)
        return len(log.undecided()) == 1
    except Exception:  # noqa: BLE001 an unknown Python may fail in any way
        return False


def _line(instruction: dis.Instruction, frame: FrameType) -> int:
    return (instruction.positions.lineno if instruction.positions else None) or frame.f_lineno


#: A variable, whether the code reads its length, and which axis of its shape it reads.
_Read = tuple[str, bool, int | None]


def _number(frame: FrameType, name: str, length: bool, axis: int | None) -> Any:
    value: Any = frame.f_locals.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, Tensor):
        return value.shape[axis] if axis is not None and -value.dim() <= axis < value.dim() else None
    return len(value) if length and hasattr(value, "__len__") else None


@dataclass(frozen=True, slots=True)
class _Watched:
    """An instruction before which variables are read: a conditional jump, or one that computes a number.

    `expression` holds the instructions that produce its operands.
    """

    instruction: dis.Instruction
    branches: bool
    expression: tuple[dis.Instruction, ...]
    reads: tuple[_Read, ...]


@cache
def _watched(code: CodeType) -> dict[int, _Watched]:
    """The watched instructions by offset. Instructions that compute a condition count as part of that condition."""
    found: dict[int, _Watched] = {}
    before = list[dis.Instruction]()
    for each in dis.get_instructions(code):
        if "JUMP" in each.opname and "_IF_" in each.opname:
            expression = _expression(before, 1)
            for part in expression:
                found.pop(part.offset, None)
            if not _asks_kind(expression) and (reads := _reads(expression)):
                found[each.offset] = _Watched(each, True, expression, reads)
        else:
            expression = _expression(before, 1 - dis.stack_effect(each.opcode, each.arg))
            if _computes(each, expression) and (reads := _reads(expression)):
                found[each.offset] = _Watched(each, False, expression, reads)
        before.append(each)
    return found


def _asks_kind(expression: tuple[dis.Instruction, ...]) -> bool:
    """Is it `isinstance` of a variable, which is the same for every number?"""
    operations = [each.opname for each in expression if each.opname == "CALL" or each.opname.endswith("_OP")]
    return operations == ["CALL"] and next(each.argval for each in expression if each.argval) == "isinstance"


def _computes(each: dis.Instruction, expression: tuple[dis.Instruction, ...]) -> bool:
    """Does it compute a number that may be non-linear in its operands?"""
    if each.opname == "BINARY_OP":
        return each.argrepr.rstrip("=") in {"%", "//", "&", "|", "^", ">>", "**"}
    if each.opname == "CALL":
        named = [one.argval for one in expression if one.opname.startswith(("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD"))]
        return bool(named) and (named[0] in COMPUTING or named[0] == "math" or "get" in named)
    return each.opname in {"COMPARE_OP", "CONTAINS_OP"}


def _expression(before: list[dis.Instruction], wanted: int) -> tuple[dis.Instruction, ...]:
    """The instructions that push the topmost `wanted` values."""
    start = len(before)
    while wanted > 0 and start and not any(end in before[start - 1].opname for end in _BEFORE):
        start -= 1
        wanted -= dis.stack_effect(before[start].opcode, before[start].arg, jump=False)
    return tuple(before[start:])


def _reads(expression: tuple[dis.Instruction, ...]) -> tuple[_Read, ...]:
    length = any(each.argval == "len" for each in expression)
    reads: list[_Read] = []
    for index, each in enumerate(expression):
        if _kind(each) == "name":
            names = each.argval if isinstance(each.argval, tuple) else (each.argval,)
            following = [one.argval for one in expression[index + 1 : index + 3]]
            shaped = len(following) == 2 and following[0] in {"shape", "size"} and isinstance(following[1], int)
            reads += [(name, length, following[1] if shaped else None) for name in names]
    return tuple(reads)


def _kind(each: dis.Instruction) -> str:
    if each.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return "name"
    if each.opname in {"LOAD_CONST", "LOAD_SMALL_INT"} and isinstance(each.argval, (int, float)):
        return "number"
    return each.opname


def _jumps_if(jump: dis.Instruction) -> bool:
    """The value of the condition for which it jumps."""
    return "TRUE" in jump.opname or jump.opname.endswith("IF_NONE")


@cache
def _after(code: CodeType, offset: int) -> int:
    return next((each.offset for each in dis.get_instructions(code) if each.offset > offset), offset)


@cache
def _raises(code: CodeType, offset: int) -> bool:
    for each in dis.get_instructions(code):
        if each.offset >= offset and each.opname.startswith(("RAISE_VARARGS", *_ENDS)):
            return each.opname == "RAISE_VARARGS"
    return False


def _arm(code: CodeType, jump: dis.Instruction) -> list[dis.Instruction] | None:
    """The instructions that the jump skips, if the condition has no `else`; otherwise None."""
    found: list[dis.Instruction] = []
    for each in dis.get_instructions(code):
        if each.offset <= jump.offset or each.opname in _NOTHING:
            continue
        if each.offset == jump.argval:
            return found
        if "JUMP" in each.opname:
            return found if jump.argval < jump.offset and each.argval == jump.argval else None
        found.append(each)
    return None
