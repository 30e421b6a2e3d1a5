"""PyTorch functions that combine time steps, and the earlier frames that each needs.

Left padding is a placeholder for earlier steps. If the state row holds those steps, they replace the padding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from unroll.export.lifting.scan import accumulate


@dataclass(frozen=True, slots=True)
class Memory:
    """The earlier frames that a call needs, and how the call continues from them.

    Attributes:
        x: the sequence.
        first: the placeholder for earlier frames; its length is the number of frames to keep.
        finish: computes the call's result from the earlier frames and the sequence, joined along time.
        of_result: keep frames of the result instead of the sequence.
        of_start: keep the frames that the sequence began with.
    """

    x: Tensor
    first: Tensor
    finish: Callable[[Tensor], Tensor]
    of_result: bool = False
    of_start: bool = False


#: From the time axis and a call's arguments to its memory; None if it needs no earlier steps.
Rule = Callable[..., Memory | None]


@dataclass(frozen=True, slots=True)
class HistoryCall:
    """A call that may need earlier time steps.

    Attributes:
        sequence: its input along time; None for a call that counts: its result is the sequence.
        memory: from the time axis to its memory.
        of_start: it picks the first element along some axis, possibly time.
    """

    sequence: Tensor | None
    memory: Callable[[int], Memory | None] = lambda time: None
    of_start: bool = False

    @property
    def counts(self) -> bool:
        """Does its result number the time steps, without a batch?"""
        return self.sequence is None


class HistoryCalls:
    """Decides, call by call in order, which calls may need earlier time steps."""

    def __init__(self) -> None:
        #: Sequences cut at their end, by id, with the uncut one. Frames concatenated before one form a delay.
        self._cuts: dict[int, tuple[Tensor, Tensor]] = {}

    def find(self, func: Any, args: Any, kwargs: Any) -> HistoryCall | None:
        """Describe a call before it runs; None if it needs no earlier time steps."""
        if func is functional.pad and (delay := self._padded_delay(*args, **kwargs)):
            return delay
        if rule := RULES.get(func):
            sequence = args[0] if args else kwargs["input"]
            return HistoryCall(sequence, lambda time: rule(time, *args, **kwargs))
        if func is torch.arange:
            return HistoryCall(None)
        if func is Tensor.__getitem__:
            x, index = args
            return HistoryCall(x, lambda time: _first_step(x, index, time), True) if _is_first(index) else None
        return self._delay(args, kwargs) if func in {torch.cat, torch.concat} else None

    def add(self, func: Any, args: Any, result: Any) -> None:
        """Record the result of a call after it ran."""
        if func is Tensor.__getitem__:
            index = [one for one in (args[1] if isinstance(args[1], tuple) else (args[1],)) if one is not ...]
            if all(map(_from_the_beginning, index)) and sum(one.stop is not None for one in index) == 1:
                self._cuts[id(result)] = result, args[0]

    def _delay(self, args: Any, kwargs: Any) -> HistoryCall | None:
        """A delay by `torch.cat`: frames before a sequence that lost as many at its end."""
        if not args or len(args[0]) != 2 or id(args[0][1]) not in self._cuts:
            return None
        (frames, cut), axis = args[0], kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
        _, whole = self._cuts[id(cut)]
        axis %= cut.dim()
        shapes = [[size for i, size in enumerate(t.shape) if i != axis] for t in (frames, whole)]
        if (
            whole.dim() != cut.dim()
            or shapes[0] != shapes[1]
            or whole.shape[axis] - cut.shape[axis] != frames.shape[axis]
        ):
            return None
        return _delayed(whole, frames, axis)

    def _padded_delay(
        self, input: Tensor, pad: Any, mode: str = "constant", value: float | None = None
    ) -> HistoryCall | None:
        """A delay by padding: constants before a sequence that lost as many steps at its end."""
        frames = list(pad)
        axes = [input.dim() - 1 - place // 2 for place, count in enumerate(frames) if count]
        if id(input) not in self._cuts or mode != "constant" or len(axes) != 1:
            return None
        _, whole = self._cuts[id(input)]
        (axis,), count = axes, sum(frames)
        if frames[2 * (input.dim() - 1 - axis)] != count or whole.shape[axis] - input.shape[axis] != count:
            return None
        return _delayed(whole, _full(whole, axis, count, value or 0.0), axis)


def _delayed(whole: Tensor, before: Tensor, axis: int) -> HistoryCall:
    memory = Memory(whole, before, lambda joined: joined.narrow(axis, 0, whole.shape[axis]))
    return HistoryCall(whole, lambda time: memory if time == axis else None)


def _from_the_beginning(index: Any) -> bool:
    return (
        isinstance(index, slice)
        and index.step in (None, 1)
        and (index.start is None or (isinstance(index.start, int) and index.start == 0))
    )


def _is_first(index: Any) -> bool:
    """Does the index pick the first element along some axis?"""
    each = index if isinstance(index, tuple) else (index,)
    return all(isinstance(one, (int, slice)) or one is ... for one in each) and any(map(_is_zero, each))


def _is_zero(index: Any) -> bool:
    if isinstance(index, slice):
        return _from_the_beginning(index) and isinstance(index.stop, int) and index.stop == 1
    return isinstance(index, int) and not isinstance(index, bool) and index == 0


def _first_step(x: Tensor, index: Any, time: int) -> Memory | None:
    """The first time step of the sequence, whichever chunk asks for it."""
    each = list(index) if isinstance(index, tuple) else [index]
    if ... in each:
        place = each.index(...)
        each[place : place + 1] = [slice(None)] * (x.dim() - len(each) + 1)
    if time >= len(each) or not _is_zero(each[time]):
        return None
    return Memory(x, x.narrow(time, 0, 1), lambda joined: joined[tuple(each)], of_start=True)


def _full(x: Tensor, time: int, frames: int, value: float) -> Tensor:
    return x.new_full([frames if axis == time else size for axis, size in enumerate(x.shape)], value)


def _pad(time: int, input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Memory | None:
    """Left padding with constants, or with the first step repeated."""
    pads = list(pad)
    first = 2 * (input.dim() - 1 - time)
    if mode not in {"constant", "replicate"} or first >= len(pads) or pads[first] < 1:
        return None
    frames, pads[first] = pads[first], 0
    if mode == "replicate":
        repeated = input.narrow(time, 0, 1).repeat_interleave(frames, time)
        return None if any(pads) else Memory(input, repeated, lambda joined: joined)
    before = _full(input, time, frames, min(max(value or 0.0, _LEAST), -_LEAST))
    return Memory(input, before, lambda joined: functional.pad(joined, pads, mode, value))


def _convolution(function: Any) -> Rule:
    """A convolution's own zero padding. The result keeps its length: all padding moves to the left."""

    def rule(
        time: int,
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
        after = [0, 0] * (count - 1 - axis) + [0, frames]

        def finish(joined: Tensor) -> Tensor:
            return function(functional.pad(joined, after), weight, bias, strides, pads, dilations, groups)

        return Memory(input, _full(input, time, frames, 0.0), finish) if frames > 0 else None

    return rule


def _transposed(function: Any) -> Rule:
    """A transposed convolution: keep the earlier frames that overlap the next outputs, and drop their own outputs."""

    def rule(
        time: int,
        input: Tensor,
        weight: Tensor,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Memory | None:
        count, axis = input.dim() - 2, time - 2
        if axis < 0 or _each(padding, count)[axis]:
            return None
        step = _each(stride, count)[axis]
        frames = _each(dilation, count)[axis] * (weight.shape[time] - 1) // step

        def finish(joined: Tensor) -> Tensor:
            y = function(joined, weight, bias, stride, padding, output_padding, groups, dilation)
            return y.narrow(time, frames * step, y.shape[time] - frames * step)

        return Memory(input, _full(input, time, frames, 0.0), finish) if frames > 0 else None

    return rule


def _each(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value) * (count if len(value) == 1 else 1)


def _sum(time: int, input: Tensor, dim: int, **options: Any) -> Memory | None:
    """A running sum. It continues from its last value, so chunking does not change the order of additions."""
    if dim % input.dim() != time or options.get("dtype") not in {None, input.dtype}:
        return None
    input = input if input.is_floating_point() else input.long()

    def finish(joined: Tensor) -> Tensor:
        return torch.cumsum(joined, dim, **options).narrow(time, 1, joined.shape[time] - 1)

    return Memory(input, _full(input, time, 1, 0.0), finish, of_result=True)


def _running(step: Callable[[Tensor, Tensor], Tensor], first: float, returned: Any = None) -> Rule:
    """A running maximum, product or similar, which continues from its last value.

    Args:
        step: combines the last value and the next element.
        first: the value before the first step.
        returned: the type of a result that also has indices. These are -1: they would count from the first step.
    """

    def rule(time: int, input: Tensor, dim: int, **options: Any) -> Memory | None:
        if dim % input.dim() != time or not input.is_floating_point() or options:
            return None

        def finish(joined: Tensor) -> Any:
            values = accumulate(step, joined, time)
            return returned((values, torch.full_like(values, -1, dtype=torch.int64))) if returned else values

        return Memory(input, _full(input, time, 1, first), finish, of_result=True)

    return rule


def _difference(
    time: int, input: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None
) -> Memory | None:
    """`torch.diff`, with `prepend` as the steps before the first."""
    if prepend is None or append is not None or n != prepend.shape[time] or dim % input.dim() != time:
        return None
    return Memory(input, prepend, lambda joined: torch.diff(joined, n, dim))


def _logaddexp(one: Tensor, other: Tensor) -> Tensor:
    """`torch.logaddexp` without the overflow of its ONNX translation."""
    return torch.maximum(one, other) + torch.log1p(torch.exp(-(one - other).abs()))


#: The lowest finite float32: a state must not hold infinity.
_LEAST = torch.finfo(torch.float32).min

RULES: dict[Any, Rule] = {
    functional.pad: _pad,
    torch.conv1d: _convolution(torch.conv1d),
    torch.conv2d: _convolution(torch.conv2d),
    torch.conv_transpose1d: _transposed(torch.conv_transpose1d),
    torch.conv_transpose2d: _transposed(torch.conv_transpose2d),
}
for _name, _rule in {
    "diff": _difference,
    "cumsum": _sum,
    "cummax": _running(torch.maximum, _LEAST, torch.return_types.cummax),
    "cummin": _running(torch.minimum, -_LEAST, torch.return_types.cummin),
    "cumprod": _running(torch.mul, 1.0),
    "logcumsumexp": _running(_logaddexp, _LEAST),
}.items():
    RULES |= dict.fromkeys((getattr(torch, _name), getattr(Tensor, _name)), _rule)
