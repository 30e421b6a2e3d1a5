"""Finds the line of the user's code that raised an error, and rewrites a branch there as torch.where."""

import ast
import linecache
import os
import re
import sysconfig
import traceback
from contextlib import suppress
from pathlib import Path

from unroll import bundle

#: Packages whose frames are skipped.
_LIBRARIES = {"torch", "numpy", "sympy", "mpmath", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "safetensors"}

_OWN = [Path(__file__).resolve().parent, Path(bundle.__file__).resolve().parent]
_STANDARD = Path(sysconfig.get_path("stdlib"))

#: The longest line of code to quote, in characters.
_SHORT = 80

#: The location of a frame in the text of a traceback.
_ENTRY = re.compile(r'File "(.+?)", line (\d+)')


def source_line(error: BaseException) -> str:
    """` (at net.py:14: y = x.view(7))`; empty if the traceback contains no user code."""
    return _at(_frame(error))


def current_line() -> str:
    """The same for the user code that is running now."""
    frames = traceback.extract_stack()
    begun = next((place for place, frame in enumerate(frames) if _is_own(frame.filename)), 0)
    return _at(next((frame for frame in reversed(frames[begun:]) if is_users(frame.filename)), None))


def traced_line(trace: str) -> str:
    """The same for the text of a traceback."""
    found = [match for match in _ENTRY.finditer(trace) if is_users(match[1])]
    return _at(traceback.FrameSummary(found[-1][1], int(found[-1][2]), "") if found else None)


def _at(frame: traceback.FrameSummary | None) -> str:
    if frame is None:
        return ""
    line = (frame.line or "").strip()
    code = f": {line}" if 0 < len(line) <= _SHORT else ""
    return f" (at {shown(frame.filename)}:{frame.lineno}{code})"


def _frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost frame of user code."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for each in reversed(chain):
        frames = [frame for frame in traceback.extract_tb(each.__traceback__) if is_users(frame.filename)]
        if frames:
            return frames[-1]
    return None


def statement_at(filename: str, line: int) -> ast.stmt | None:
    """The `if` or `assert` statement that starts at `line`."""
    with suppress(SyntaxError):
        nodes = ast.walk(ast.parse("".join(linecache.getlines(filename))))
        return next((node for node in nodes if isinstance(node, (ast.If, ast.Assert)) and node.lineno == line), None)
    return None


def as_where(error: BaseException) -> str:
    """Rewrite the branch that raised an error as an assignment `y = torch.where(n == 0, a, b)`; empty if impossible."""
    frame = _frame(error)
    statement = statement_at(frame.filename, frame.lineno or 0) if frame else None
    if not isinstance(statement, ast.If) or not isinstance(statement.test, ast.Call):
        return ""
    call, branches = statement.test, [statement.body, statement.orelse or statement.body]
    one, other = (branch[0] for branch in branches)
    if not isinstance(one, ast.Assign) or not isinstance(other, ast.Assign) or {*map(len, branches)} != {1}:
        return ""
    (target, *_), targets = one.targets, {ast.unparse(each.targets[0]) for each in (one, other)}
    reduced = call.args[0] if call.args else call.func.value if isinstance(call.func, ast.Attribute) else call
    if len(targets) > 1 or not isinstance(target, ast.Name):
        return ""
    otherwise = ast.unparse(other.value) if statement.orelse else target.id
    return f"{target.id} = torch.where({ast.unparse(reduced)}, {ast.unparse(one.value)}, {otherwise})"


def is_users(filename: str) -> bool:
    """Is it code of the user or of a third-party package, rather than Unroll's, PyTorch's or Python's?"""
    path = Path(os.path.realpath(filename))
    parts = path.parts
    if _is_own(filename) or filename.startswith("torch/"):  # as PyTorch shortens its own
        return False
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1] not in _LIBRARIES
    return path.suffix == ".py" and not path.is_relative_to(_STANDARD)


def _is_own(filename: str) -> bool:
    return any(map(Path(os.path.realpath(filename)).is_relative_to, _OWN))


def shown(filename: str) -> str:
    """The path of a file as shown in messages."""
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
