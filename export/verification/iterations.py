"""Checks, from a log of the user's own module, that all iterations of a lifted loop do the same.

Two iterations are equal if their operations, constants and sources of operands are equal. An integer may grow by a
fixed amount per iteration, as an index does.
"""

import linecache
import sys
import sysconfig
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unroll.export.lifting.dataflow import hooked

#: An operation: everything that must be equal in all iterations, and its integers.
Operation = tuple[tuple[Any, ...], tuple[int, ...]]

#: Paths of code that is not the user's.
_FOREIGN = (str(Path(torch.__file__).parent), str(Path(np.__file__).parent), str(Path(__file__).parents[2]), "<frozen")
_LIBRARY = sysconfig.get_path("stdlib")

#: Functions that make a tensor from numbers.
_FILLING = {torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.full, torch.full_like, Tensor.new_tensor}

#: Leading iterations that may differ: comparing the numeric results of short sequences covers them.
_SETTLED = 5


@dataclass(frozen=True, slots=True)
class Place:
    """Where the user's code called an operation.

    `instructions` holds the instruction offset in each frame, from `forward` down to the call.
    """

    file: str
    line: int
    instructions: tuple[int, ...]

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.line).strip()
        return f"{Path(self.file).name}:{self.line}" + (f", {text[:80]!r}" if text else "")


@dataclass(frozen=True, slots=True)
class Call:
    """The operations of one call of a module, and where they were called, if places are logged."""

    operations: list[Operation]
    places: list[Place]

    def signature(self) -> list[tuple[str, tuple[int, ...]]]:
        """The name of each operation, and the instructions that called it."""
        pairs = zip(self.operations, self.places, strict=True)
        return [(key[0], place.instructions) for (key, _), place in pairs]


class OperationLog(TorchFunctionMode):
    """Logs the operations of some modules, including their submodules.

    Attributes:
        calls: by module path, the calls since the log was created.
    """

    def __init__(self, model: nn.Module, paths: list[str], *, places: bool = False) -> None:
        super().__init__()
        self._model, self._paths, self._with_places = model, paths, places
        # Keep the tensors alive: if forward replaced a buffer, a new tensor could reuse its id.
        self._owned = [*model.parameters(), *model.buffers()]
        self._own = {id(tensor): number for number, tensor in enumerate(self._owned)}
        self._made: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._call: Call | None = None
        self._forward: Any = None
        self.calls: dict[str, list[Call]] = {path: [] for path in paths}

    @contextmanager
    def running(self) -> Iterator[None]:
        modules = [(path, self._model.get_submodule(path)) for path in self._paths]
        handles = [module.register_forward_pre_hook(self._begin(path)) for path, module in modules]
        handles += [module.register_forward_hook(self._end) for _, module in modules]
        with hooked(handles), self:
            yield

    def _begin(self, path: str) -> Any:
        def hook(module: nn.Module, *_: Any) -> None:
            self._call, self._forward = Call([], []), getattr(type(module).forward, "__code__", None)
            self.calls[path].append(self._call)

        return hook

    def _end(self, *_: Any) -> None:
        self._call = None
        self._made.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call, kwargs = self._call, kwargs or {}
        if call is None:
            return func(*args, **kwargs)
        key, integers = [getattr(func, "__name__", repr(func))], list[int]()
        # A number that becomes a tensor is a constant of the step. Indices and sizes may grow.
        self._describe((args, kwargs), key, integers, key if func in _FILLING else integers)
        result = func(*args, **kwargs)
        number = len(call.operations)
        for which, tensor in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
            if isinstance(tensor, Tensor):
                self._made[id(tensor)] = weakref.ref(tensor), number, which
        call.operations.append((tuple(key), tuple(integers)))
        if self._with_places:
            call.places.append(_place(sys._getframe(1), self._forward))
        return result

    def _describe(self, value: Any, key: list[Any], origins: list[Any], integers: list[Any]) -> None:
        """Append an argument's description to `key`, its tensors' origins to `origins`, its integers to `integers`."""
        if isinstance(value, Tensor):
            made = self._made.get(id(value))
            key += (tuple(value.shape), self._own.get(id(value)), made is not None and made[0]() is value)
            if made is not None and made[0]() is value:
                origins += made[1:]
        elif isinstance(value, int) and not isinstance(value, bool):
            integers.append(value)
        elif isinstance(value, slice):
            self._describe((value.start, value.stop, value.step), key, origins, integers)
        elif isinstance(value, (tuple, list)):
            key.append(len(value))
            for item in value:
                self._describe(item, key, origins, integers)
        elif isinstance(value, dict):
            key.append(tuple(value))
            self._describe(tuple(value.values()), key, origins, integers)
        else:
            key.append(value.tobytes() if isinstance(value, np.ndarray) else repr(value))


def _place(frame: FrameType | None, forward: Any) -> Place:
    """The place of a call; `forward` is the code object of the module's own forward."""
    frames: list[FrameType] = []
    while frame is not None and forward not in {each.f_code for each in frames[-1:]}:
        frames.append(frame)
        frame = frame.f_back
    file, line = next(((f.f_code.co_filename, f.f_lineno) for f in frames if not is_foreign(f.f_code)), ("", 0))
    return Place(file, line, tuple(each.f_lasti for each in reversed(frames)))


def is_foreign(code: CodeType) -> bool:
    """Does it belong to Python, PyTorch, NumPy or Unroll rather than to the user?"""
    file = code.co_filename
    return file.startswith(_FOREIGN) or (file.startswith(_LIBRARY) and "site-packages" not in file)


def irregular(operations: list[Operation], short: tuple[int, int], steps: int, delay: int = 0) -> int | None:
    """The index of the first operation that breaks the pattern of earlier iterations; None if all iterations are equal.

    Args:
        operations: the operations of a call over `steps` time steps.
        short: the number of operations of a call over 3 and over 5 time steps.
        steps: the expected number of iterations.
        delay: how many iterations back the oldest value that an iteration reads was computed.
    """
    size = (short[1] - short[0]) // 2
    around = short[0] - 3 * size
    for index in range(around + max(_SETTLED, delay + 2) * size, len(operations) - around - size):
        (key, now), (before, last), (_, earlier) = (operations[index - turn * size] for turn in range(3))
        if key != before or any(a - b != b - c for a, b, c in zip(now, last, earlier, strict=False)):
            return index
    return None if len(operations) == around + steps * size else len(operations) - 1


def step_of(call: Call, index: int, size: int) -> int:
    """The iteration that an operation belongs to, counted by backward jumps in the code.

    Args:
        size: operations per iteration.
    """
    found = [place.instructions for place in call.places]
    back = [now for now in range(1, len(found)) if found[now] < found[now - 1]]
    every = sum(index - size <= now < index for now in back)
    return sum(now <= index for now in back) // every if every else index // size
