"""Do all iterations of a lifted loop do the same? From a log of the operations of the user's own module.

An iteration is one step of all only if its operations, their constants and where their operands come from are those of
the iterations before it. An integer may grow by the same amount from one iteration to the next, as an index does.
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

#: An operation, with everything that must be the same in all iterations; and its integers.
Operation = tuple[tuple[Any, ...], tuple[int, ...]]

#: Frames of these are not the user's.
_FOREIGN = (str(Path(torch.__file__).parent), str(Path(np.__file__).parent), str(Path(__file__).parents[2]), "<frozen")
_LIBRARY = sysconfig.get_path("stdlib")

#: Functions that make a tensor of numbers.
_FILLING = {torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.full, torch.full_like, Tensor.new_tensor}

#: Iterations at the beginning that may differ: short sequences are compared with the loop's body number by number.
_SETTLED = 5


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the user's code an operation was called. instructions: of `forward`, of what it calls, and so on."""

    file: str
    line: int
    instructions: tuple[int, ...]

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.line).strip()
        return f"{Path(self.file).name}:{self.line}" + (f", {text[:80]!r}" if text else "")


@dataclass(frozen=True, slots=True)
class Call:
    """What one call of a module did. places: where in the user's code, if that was asked for."""

    operations: list[Operation]
    places: list[Place]

    def signature(self) -> list[tuple[str, tuple[int, ...]]]:
        """The name of each operation, and where it is called."""
        pairs = zip(self.operations, self.places, strict=True)
        return [(key[0], place.instructions) for (key, _), place in pairs]


class OperationLog(TorchFunctionMode):
    """Logs what some modules do, everything inside them included.

    calls: by path, those since the log began.
    """

    def __init__(self, model: nn.Module, paths: list[str], *, places: bool = False) -> None:
        super().__init__()
        self._model, self._paths, self._with_places = model, paths, places
        # Held here, so that no other tensor gets the identity of a buffer that forward replaces.
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
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

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
        # A number that becomes a tensor is a constant of its step; others are indices and sizes, which may grow.
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
        """Append what an argument is to the key, where its tensors come from, and its integers."""
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
    """forward: the code of the module's own."""
    frames: list[FrameType] = []
    while frame is not None and forward not in {each.f_code for each in frames[-1:]}:
        frames.append(frame)
        frame = frame.f_back
    file, line = next(((f.f_code.co_filename, f.f_lineno) for f in frames if not is_foreign(f.f_code)), ("", 0))
    return Place(file, line, tuple(each.f_lasti for each in reversed(frames)))


def is_foreign(code: CodeType) -> bool:
    """Is it not the user's?"""
    file = code.co_filename
    return file.startswith(_FOREIGN) or (file.startswith(_LIBRARY) and "site-packages" not in file)


def irregular(operations: list[Operation], short: tuple[int, int], steps: int, delay: int = 0) -> int | None:
    """The first operation that is not what the iterations before it say; None if all iterations do the same.

    Args:
        operations: of a call over `steps` time steps.
        short: how many a call over 3 and over 5 time steps has.
        steps: the number of iterations there should be.
        delay: how many iterations before the oldest value is made that an iteration takes.
    """
    size = (short[1] - short[0]) // 2
    around = short[0] - 3 * size
    for index in range(around + max(_SETTLED, delay + 2) * size, len(operations) - around - size):
        (key, now), (before, last), (_, earlier) = (operations[index - turn * size] for turn in range(3))
        if key != before or any(a - b != b - c for a, b, c in zip(now, last, earlier, strict=False)):
            return index
    return None if len(operations) == around + steps * size else len(operations) - 1


def step_of(call: Call, index: int, size: int) -> int:
    """The iteration of an operation, counted by how often the code goes back to an earlier instruction.

    size: of an iteration, in operations.
    """
    found = [place.instructions for place in call.places]
    back = [now for now in range(1, len(found)) if found[now] < found[now - 1]]
    every = sum(index - size <= now < index for now in back)
    return sum(now <= index for now in back) // every if every else index // size
