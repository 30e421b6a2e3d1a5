"""Recomputes number expressions of the user's code from source, and recognises code that only prints, logs or warns."""

import ast
import builtins
import dis
import linecache
import logging
import math
import warnings
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import Tensor

#: The nodes allowed in an expression that is recomputed: none has side effects.
_PURE = (
    *(ast.Expression, ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call),
    *(ast.Attribute, ast.Subscript, ast.Slice, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.keyword),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context),
)

_ROUNDING = {"int", "round"}

#: Functions that may be non-linear in a number.
COMPUTING = {"min", "max", "bool", "divmod", "pow", *_ROUNDING}
_FUNCTIONS = {"abs", "float", "len", *COMPUTING}
_METHODS = {"size", "dim"}

#: Methods of tensors and strings allowed in printed text.
_SHOWN = {
    *("item", "mean", "sum", "norm", "max", "min", "abs", "std"),
    *("detach", "cpu", "numpy", "tolist", "format", "shape"),
}

#: The instructions of a statement that only calls a function.
_CALLING = ("LOAD_", "PUSH_NULL", "PRECALL", "CALL", "KW_NAMES", "POP_TOP", "FORMAT_", "CONVERT_", "BUILD_", "BINARY_")


@dataclass(frozen=True, slots=True)
class Expression:
    """An expression that computes a number.

    Attributes:
        code: the compiled expression; None without source.
        is_threshold: a comparison, `min` or `max`: it follows another rule beyond a threshold.
        rounds: it rounds; on integers it may be the identity.
    """

    code: CodeType | None
    is_threshold: bool
    rounds: bool

    @classmethod
    def of(cls, code: CodeType, instruction: dis.Instruction) -> "Expression | None":
        """Parse the source of the instruction; None if it may have side effects."""
        try:
            tree = ast.parse(f"({_source(code, instruction)})", mode="eval")
        except (SyntaxError, ValueError, TypeError):
            return cls(None, False, False)
        if not is_pure(tree):
            return None
        called = tree.body.func.id if isinstance(tree.body, ast.Call) and isinstance(tree.body.func, ast.Name) else ""
        least = isinstance(tree.body, ast.Compare) and not any(
            isinstance(op, (ast.In, ast.NotIn)) for op in tree.body.ops
        )
        rounds = called in _ROUNDING or (isinstance(tree.body, ast.BinOp) and isinstance(tree.body.op, ast.FloorDiv))
        return cls(compile(tree, code.co_filename, "eval"), least or called in {"min", "max"}, rounds)

    def value(self, frame: FrameType) -> Any:
        """Evaluate the expression in `frame`. Returns an exception instead of raising it."""
        if self.code is None:
            return None
        try:
            return eval(self.code, frame.f_globals, dict(frame.f_locals))  # noqa: S307 the code that export runs anyway
        except Exception as error:  # noqa: BLE001 user code
            return error


def is_pure(tree: ast.AST) -> bool:
    """Can it be evaluated again without side effects?"""
    return all(isinstance(node, _PURE) and _is_harmless(node) for node in ast.walk(tree))


def _is_harmless(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return True
    if isinstance(node.func, ast.Name):
        return node.func.id in _FUNCTIONS
    if not isinstance(node.func, ast.Attribute):
        return False
    if node.func.attr == "get":  # of a dict; that of a queue, without a key, takes an item out
        return bool(node.args) and not (isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, bool))
    return node.func.attr in _METHODS or (isinstance(node.func.value, ast.Name) and node.func.value.id == "math")


def _source(code: CodeType, instruction: dis.Instruction) -> str:
    place = instruction.positions
    if place is None or None in (place.lineno, place.end_lineno, place.col_offset, place.end_col_offset):
        raise ValueError("no position for this instruction")
    first, last = place.lineno or 0, place.end_lineno or 0
    lines = [linecache.getline(code.co_filename, line).encode() for line in range(first, last + 1)]
    lines[-1] = lines[-1][: place.end_col_offset]
    lines[0] = lines[0][place.col_offset :]
    if not (found := b"".join(lines).decode()):
        raise ValueError("no source for this instruction")
    return found


def says_only(arm: list[dis.Instruction], frame: FrameType) -> bool:
    """Does `arm` only print, log or warn? Names are looked up in `frame`."""
    if not all(each.opname.startswith(_CALLING) or each.opname == "COMPARE_OP" for each in arm):
        return False
    begins = True
    for index, each in enumerate(arm):
        if each.opname == "POP_TOP":
            begins = True
        elif each.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FAST", "LOAD_DEREF")):
            chain = [one.argval for one in _attributes(arm[index + 1 :])]
            value = _looked_up(each.argval, frame)
            if not (_says(value, chain) if begins else _is_shown(value, chain)):
                return False
            begins = False
    return True


def _attributes(rest: list[dis.Instruction]) -> list[dis.Instruction]:
    found = []
    for each in rest:
        if not each.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            break
        found.append(each)
    return found


def _looked_up(name: Any, frame: FrameType) -> Any:
    for names in (frame.f_locals, frame.f_globals, vars(builtins)):
        if name in names:
            return names[name]
    return None


def _says(value: Any, chain: list[str]) -> bool:
    """Is it `print`, a method of a logger, or a function of `logging` or `warnings`?"""
    for name in chain[:-1]:
        value = getattr(value, name, None)
    return value is print if not chain else isinstance(value, logging.Logger) or value in (logging, warnings)


def _is_shown(value: Any, chain: list[str]) -> bool:
    if value in (float, int, str, len, round, repr):
        return not chain
    plain = value is None or isinstance(value, (Tensor, int, float, str)) or value is math
    return plain and set(chain) <= _SHOWN
