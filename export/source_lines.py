"""Finds the line of the user's code at which an error was raised."""

import os
import sysconfig
import traceback
from pathlib import Path

#: Packages whose frames are not the user's.
_LIBRARIES = {"torch", "numpy", "sympy", "mpmath", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "safetensors"}

_OWN, _STANDARD = Path(__file__).resolve().parent, Path(sysconfig.get_path("stdlib"))

#: Characters of a line of code that is quoted.
_SHORT = 80


def source_line(error: BaseException) -> str:
    """` (at net.py:14: y = x.view(7))`, or nothing if none of the user's code was running."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for each in reversed(chain):
        frames = [frame for frame in traceback.extract_tb(each.__traceback__) if _is_users(frame.filename)]
        if frames:
            line = (frames[-1].line or "").strip()
            code = f": {line}" if 0 < len(line) <= _SHORT else ""
            return f" (at {_shown(frames[-1].filename)}:{frames[-1].lineno}{code})"
    return ""


def _is_users(filename: str) -> bool:
    path = Path(os.path.realpath(filename))
    parts = path.parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1] not in _LIBRARIES
    return path.suffix == ".py" and not path.is_relative_to(_OWN) and not path.is_relative_to(_STANDARD)


def _shown(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
