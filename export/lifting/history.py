"""What a model knows of the past beside its recurrent layers: the last frames of a causal convolution, a running sum,
how many time steps there were.

Seen at PyTorch's own functions, so that it does not matter which module calls them. What is put before a sequence
stands for what came before it: where the state row has that, it takes its place. Whether that makes the model
one that streams is then found out by running it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from unroll.export.lifting.state_row import fits_row, from_row, to_row
from unroll.export.lifting.tape import Call, Part, Tape, count_up


@dataclass(frozen=True, slots=True)
class Memory:
    """x: the sequence. first: what stands for its past before there is any, in as many frames as are kept.

    finish: from the past and the sequence, joined, to the result. of_result: the frames kept are the result's.
    """

    x: Tensor
    first: Tensor
    finish: Callable[[Tensor], Tensor]
    of_result: bool = False


#: What was watched, and whether it is numbers that are counted.
_Seen = list[tuple[Tensor, bool]]

#: From a call's arguments and the time axis to what it remembers, if anything.
Rule = Callable[[Any, Any, int], Memory | None]


@dataclass(frozen=True, slots=True)
class Place:
    """The axes of a tensor whose time is the input's. counted: it is numbers along time, without a batch."""

    batch: int
    time: int
    counted: bool = False


class _Cuts:
    """Sequences without their last steps, as they are made; frames put before one make a delay of it."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, func: Any, args: Any, result: Any) -> None:
        if func is Tensor.__getitem__:
            index = [one for one in (args[1] if isinstance(args[1], tuple) else (args[1],)) if one is not ...]
            if all(map(_from_the_beginning, index)) and sum(one.stop is not None for one in index) == 1:
                self._made[id(result)] = result, args[0]

    def delay(self, func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, int] | None:
        """The whole sequence, the frames, and the axis along which the call puts them before what is left of it."""
        if func not in {torch.cat, torch.concat} or not args or len(args[0]) != 2 or id(args[0][1]) not in self._made:
            return None
        (frames, cut), axis = args[0], kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
        _, whole = self._made[id(cut)]
        axis %= cut.dim()
        shapes = [[size for i, size in enumerate(t.shape) if i != axis] for t in (frames, whole)]
        if (
            whole.dim() != cut.dim()
            or shapes[0] != shapes[1]
            or whole.shape[axis] - cut.shape[axis] != frames.shape[axis]
        ):
            return None
        return whole, frames, axis


def _from_the_beginning(index: Any) -> bool:
    return (
        isinstance(index, slice)
        and index.step in (None, 1)
        and (index.start is None or (isinstance(index.start, int) and index.start == 0))
    )


class Watch(TorchFunctionMode):
    """Writes down the sequences that calls with a rule are given, and the numbers that are counted, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, bool]] = []
        self._cuts = _Cuts()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _RULES:
            self.seen.append((_input(args, kwargs), False))
        elif func is torch.arange:
            self.seen.append((result, True))
        elif delay := self._cuts.delay(func, args, kwargs):
            self.seen.append((delay[0], False))
        self._cuts.add(func, args, result)
        return result


def places(base: _Seen, wide: _Seen, long: _Seen, time: int) -> list[Place | None]:
    """Where batch and time are in what was watched at three sizes; `time` is the length of the first."""
    if not len(base) == len(wide) == len(long):
        return []
    found: list[Place | None] = []
    for watched in zip(base, wide, long, strict=True):
        tensors, counted = [tensor for tensor, _ in watched], watched[0][1]
        batch, steps = (
            [axis for axis in range(tensors[0].dim()) if tensors[0].shape[axis] != other.shape[axis]]
            if other.dim() == tensors[0].dim()
            else []
            for other in tensors[1:]
        )
        if len(steps) != 1 or len(batch) > 1 or batch == steps or tensors[0].shape[steps[0]] != time:
            found.append(None)
        elif counted:
            alike = torch.equal(tensors[0], tensors[2][:time])
            found.append(Place(0, 0, counted=True) if alike else None)
        else:
            found.append(Place(batch[0], steps[0]) if batch else None)
    return found


class Keep(TorchFunctionMode):
    """Within, calls with a rule take the past from the tape and leave it there. places: of these calls, in order.

    batch: of what forward is given, which is 1 where numbers are counted: rows are not equally far.
    """

    def __init__(self, tape: Tape, model: nn.Module, places: list[Place | None], batch: int) -> None:
        self._tape, self._places, self._batch = tape, iter(places), batch
        self._root = type(model).__name__
        # Known by its attributes: a tracer calls a stand-in that shares them.
        self._paths = {id(vars(module)): path or type(module).__name__ for path, module in model.named_modules()}
        self._stack: list[str] = []
        self._cuts = _Cuts()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, it is on, and knows which module is running."""

        def leave(*_: Any) -> None:
            self._stack.pop()

        handles = (
            register_module_forward_pre_hook(
                lambda module, _: self._stack.append(self._paths.get(id(vars(module)), ""))
            ),
            register_module_forward_hook(leave),
        )
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RULES:
            place = next(self._places, None)
            memory = _RULES[func](args, kwargs, place.time) if place else None
            if place and memory and fits_row(memory.x.dtype):
                return self._run(memory, place.batch, place.time)
        if func is torch.arange and next(self._places, None):
            return self._count(func(*args, **kwargs), args[2] if len(args) > 2 else kwargs.get("step", 1))
        if delay := self._cuts.delay(func, args, kwargs):
            (x, first, axis), place = delay, next(self._places, None)
            if place and place.time == axis and fits_row(x.dtype):
                memory = Memory(x, first, lambda joined: joined.narrow(axis, 0, x.shape[axis]))
                return self._run(memory, place.batch, axis)
        result = func(*args, **kwargs)
        self._cuts.add(func, args, result)
        return result

    def _path(self) -> str:
        """Of the module that is running."""
        return next((path for path in reversed(self._stack) if path), self._root)

    def _count(self, numbers: Tensor, step: Any) -> Tensor:
        """numbers: (time,), that begin where a sequence does, each `step` more than the last."""
        path, zero = self._path(), torch.zeros(self._batch, 1, dtype=torch.int64)
        index, (start,) = self._tape.begin(path, lambda: [to_row(zero)])
        count, time = from_row(start, zero.dtype), numbers.shape[0]
        final = to_row(count + (time if self._tape.lens is None else self._tape.lens.long().unsqueeze(1)))
        self._tape.calls.append(Call(path, index, (Part("count"),), self._batch, time, [start], [final]))
        return numbers if self._tape.given is None else numbers + (step * count[0]).to(numbers.dtype)

    def _run(self, memory: Memory, batch_axis: int, time_axis: int) -> Tensor:
        x, path = memory.x, self._path()
        first, major = (tensor.movedim((batch_axis, time_axis), (0, 1)) for tensor in (memory.first, x))
        batch, time, *rest = major.shape
        frames = int(first.shape[1])
        index, (start,) = self._tape.begin(path, lambda: [to_row(first.flatten(1))])
        past = from_row(start, x.dtype).reshape(batch, frames, *rest)
        joined = torch.cat([past, major], 1).movedim((0, 1), (batch_axis, time_axis))
        result = memory.finish(joined)
        kept = (result if memory.of_result else joined).movedim((batch_axis, time_axis), (0, 1))
        final = _last(kept, frames, time, self._tape.lens)
        self._tape.calls.append(Call(path, index, (Part("past"),), batch, time, [start], [to_row(final)]))
        return result


def _last(kept: Tensor, frames: int, time: Any, lens: Tensor | None) -> Tensor:
    """(batch, frames * rest): the frames up to the end of each row. kept: (batch, more + time, ...)."""
    if lens is None:
        return kept[:, -frames:].flatten(1)
    more = kept.shape[1] - time
    steps = (lens.long() + more - frames).unsqueeze(1) + count_up(frames)
    if isinstance(kept.shape[0], int) and kept.shape[0] == 1:
        return kept[:, steps[0]].flatten(1)  # PyTorch's own rule for `gather` fixes the number of rows
    flat = kept.flatten(2) if kept.dim() > 2 else kept.unsqueeze(2)
    return flat.gather(1, steps.unsqueeze(2).expand(-1, -1, flat.shape[2])).flatten(1)


def _input(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["input"]


def _full(x: Tensor, time: int, frames: int, value: float) -> Tensor:
    return x.new_full([frames if axis == time else size for axis, size in enumerate(x.shape)], value)


def _pad(args: Any, kwargs: Any, time: int) -> Memory | None:
    """Constants put before a sequence, or its first step."""

    def call(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Memory | None:
        pads = list(pad)
        first = 2 * (input.dim() - 1 - time)
        if mode not in {"constant", "replicate"} or first >= len(pads) or pads[first] < 1:
            return None
        frames, pads[first] = pads[first], 0
        if mode == "replicate":
            if any(pads):
                return None
            return Memory(input, input.narrow(time, 0, 1).repeat_interleave(frames, time), lambda joined: joined)
        before = _full(input, time, frames, value or 0.0)
        return Memory(input, before, lambda joined: functional.pad(joined, pads, mode, value))

    return call(*args, **kwargs)


def _convolution(function: Any) -> Rule:
    """Zeros that a convolution puts on both ends of a sequence. Its result is as long as ever."""

    def rule(args: Any, kwargs: Any, time: int) -> Memory | None:
        def call(
            input: Tensor,
            weight: Tensor,
            bias: Any = None,
            stride: Any = 1,
            padding: Any = 0,
            dilation: Any = 1,
            groups: int = 1,
        ) -> Memory | None:
            count, axis = input.dim() - 2, time - 2
            strides, dilations = _each(stride, count), _each(dilation, count)
            if axis < 0 or isinstance(padding, str) or strides[axis] != 1:
                return None
            pads = _each(padding, count)
            frames, pads[axis] = pads[axis], 0
            if frames < 1:
                return None
            after = [0, 0] * (count - 1 - axis) + [0, frames]

            def finish(joined: Tensor) -> Tensor:
                return function(functional.pad(joined, after), weight, bias, strides, pads, dilations, groups)

            return Memory(input, _full(input, time, frames, 0.0), finish)

        return call(*args, **kwargs)

    return rule


def _each(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value) * (count if len(value) == 1 else 1)


def _sum(args: Any, kwargs: Any, time: int) -> Memory | None:
    """A running sum: it is taken up where it was, so that it adds in the same order however the sequence is cut."""

    def call(input: Tensor, dim: int, **options: Any) -> Memory | None:
        if dim % input.dim() != time or options.get("dtype") not in {None, input.dtype}:
            return None
        input = input if input.is_floating_point() else input.long()

        def finish(joined: Tensor) -> Tensor:
            return torch.cumsum(joined, dim, **options).narrow(time, 1, joined.shape[time] - 1)

        return Memory(input, _full(input, time, 1, 0.0), finish, of_result=True)

    return call(*args, **kwargs)


def _difference(args: Any, kwargs: Any, time: int) -> Memory | None:
    """Of each step from the one before it, or further back; before the first comes what is given."""

    def call(
        input: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None
    ) -> Memory | None:
        if prepend is None or append is not None or n != prepend.shape[time] or dim % input.dim() != time:
            return None
        return Memory(input, prepend, lambda joined: torch.diff(joined, n, dim))

    return call(*args, **kwargs)


_RULES: dict[Any, Rule] = {
    functional.pad: _pad,
    torch.conv1d: _convolution(torch.conv1d),
    torch.conv2d: _convolution(torch.conv2d),
    torch.diff: _difference,
    Tensor.diff: _difference,
    torch.cumsum: _sum,
    Tensor.cumsum: _sum,
}
