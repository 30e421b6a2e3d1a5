"""State outside recurrent layers: the last frames of a causal convolution, a running sum, the number of time steps.

It is observed at PyTorch's functions, so it does not matter which module calls them. A later run decides whether the
model streams with this history.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from unroll.export.lifting.dataflow import Observer
from unroll.export.lifting.history_rules import HistoryCall, HistoryCalls, Memory
from unroll.export.lifting.state_row import fits_row, from_row, to_row
from unroll.export.lifting.tape import Call, Part, Tape, count_up

#: Calls that may need earlier time steps, each with its sequence.
Watched = list[tuple[Tensor, HistoryCall]]


@dataclass(frozen=True, slots=True)
class Place:
    """The axes of a sequence that runs along the input's time.

    Attributes:
        batch, time: the axes.
        counted: the sequence is a count along time, without a batch.
        first: for a call that picks the first time step, its index among such calls; otherwise None.
        rate: frames per time step of the input.
        ahead: trailing frames that later time steps complete, as in a transposed convolution.
    """

    batch: int
    time: int
    counted: bool = False
    first: int | None = None
    rate: int = 1
    ahead: int = 0


class WatchHistory(Observer):
    """Records the sequences of calls that may need earlier time steps, in order."""

    def __init__(self) -> None:
        self.seen: Watched = []
        self._calls = HistoryCalls()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = self._calls.find(func, args, kwargs)
        result = func(*args, **kwargs)
        if call:
            self.seen.append((result if call.sequence is None else call.sequence, call))
        self._calls.add(func, args, result)
        return result


def places(base: Watched, wide: Watched, long: Watched, time: int, longer: int) -> list[Place | None]:
    """Locate batch and time in sequences watched at three sizes; None for a sequence that does not follow the input.

    Calls that pick the first time step come last, and are omitted instead of None.

    Args:
        base, wide, long: watched on the same forward; `wide` has another batch size, `long` another length.
        time, longer: the lengths of `base` and `long`.
    """
    found: list[Place | None] = []
    for of_start in (False, True):
        chosen = [[one for one in watched if one[1].of_start == of_start] for watched in (base, wide, long)]
        each = _places(chosen, time, longer) if len({len(one) for one in chosen}) == 1 else []
        found += [replace(p, first=n) for n, p in enumerate(each) if p] if of_start else each
    return found


def _places(sizes: list[Watched], time: int, longer: int) -> list[Place | None]:
    found: list[Place | None] = []
    for watched in zip(*sizes, strict=True):
        tensors, call = [tensor for tensor, _ in watched], watched[0][1]
        batch, steps = (
            [axis for axis in range(tensors[0].dim()) if tensors[0].shape[axis] != other.shape[axis]]
            if other.dim() == tensors[0].dim()
            else []
            for other in tensors[1:]
        )
        if len(steps) != 1 or len(batch) > 1 or batch == steps:
            found.append(None)
            continue
        frames, more = (tensors[size].shape[steps[0]] for size in (0, 2))
        rate, rest = divmod(more - frames, longer - time)
        ahead = frames - rate * time
        if call.counts:
            alike = (rate, ahead) == (1, 0) and torch.equal(tensors[0], tensors[2][:time])
            found.append(Place(0, 0, counted=True) if alike else None)
            continue
        known = batch and not rest and rate > 0 and ahead >= 0
        if call.of_start:
            known = known and (rate, ahead) == (1, 0) and call.memory(steps[0])
        found.append(Place(batch[0], steps[0], rate=rate, ahead=ahead) if known else None)
    return found


class KeepHistory(Observer):
    """Makes calls that need earlier time steps read them from the tape and write them back.

    Args:
        places: the places of these calls, as returned by `places`; None for a call that stays unchanged.
        batch: batch size of the input; 1 where time steps are counted, since rows may be at different positions.
    """

    def __init__(self, tape: Tape, model: nn.Module, places: list[Place | None], batch: int) -> None:
        self._tape, self._batch = tape, batch
        self._places = iter([place for place in places if place is None or place.first is None])
        self._firsts = {place.first: place for place in places if place and place.first is not None}
        self._picked = count()
        self._root = type(model).__name__
        # Identified by its `vars`: a tracer calls a stand-in that shares them.
        self._paths = {id(vars(module)): path or type(module).__name__ for path, module in model.named_modules()}
        self._stack: list[str] = []
        self._calls = HistoryCalls()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Activate the mode, and track which module is running."""

        def enter(module: nn.Module, _: Any) -> None:
            self._stack.append(self._paths.get(id(vars(module)), ""))

        def leave(*_: Any) -> None:
            self._stack.pop()

        with register_module_forward_pre_hook(enter), register_module_forward_hook(leave), self:
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = self._calls.find(func, args, kwargs)
        place = self._place(call) if call else None
        if call and place:
            if call.counts:
                return self._count(func(*args, **kwargs), args[2] if len(args) > 2 else kwargs.get("step", 1))
            memory = call.memory(place.time)
            if memory and fits_row(memory.x.dtype):
                return self._run(memory, place)
        result = func(*args, **kwargs)
        self._calls.add(func, args, result)
        return result

    def _place(self, call: HistoryCall) -> Place | None:
        return self._firsts.get(next(self._picked)) if call.of_start else next(self._places, None)

    def _path(self) -> str:
        """The path of the running module."""
        return next((path for path in reversed(self._stack) if path), self._root)

    def _count(self, numbers: Tensor, step: Any) -> Tensor:
        """Continue a count: `numbers` (time,) increase by `step` from the start of a sequence."""
        path, zero = self._path(), torch.zeros(self._batch, 1, dtype=torch.int64)
        index, (start,) = self._tape.begin(path, lambda: [to_row(zero)])
        before, time = from_row(start, zero.dtype), numbers.shape[0]
        final = to_row(before + (time if self._tape.lens is None else self._tape.lens.long().unsqueeze(1)))
        self._tape.calls.append(Call(path, index, (Part("count"),), self._batch, time, [start], [final]))
        return numbers if self._tape.given is None else numbers + (step * before[0]).to(numbers.dtype)

    def _run(self, memory: Memory, place: Place) -> Tensor:
        x, path, batch_axis, time_axis = memory.x, self._path(), place.batch, place.time
        first, major = (tensor.movedim((batch_axis, time_axis), (0, 1)) for tensor in (memory.first, x))
        batch, length, *rest = major.shape
        frames, length = int(first.shape[1]), length - place.ahead
        index, (start,) = self._tape.begin(path, lambda: [to_row(first.flatten(1))])
        past = from_row(start, x.dtype).reshape(batch, frames, *rest)
        joined = torch.cat([past, major], 1).movedim((0, 1), (batch_axis, time_axis))
        result = memory.finish(joined)
        final = start
        if not memory.of_start:
            values = result[0] if isinstance(result, tuple) else result
            kept = (values if memory.of_result else joined).movedim((batch_axis, time_axis), (0, 1))
            lens = None if self._tape.lens is None else self._tape.lens.long() * place.rate
            final = to_row(_last(kept[:, : kept.shape[1] - place.ahead], frames, length, lens))
        time = length // place.rate
        self._tape.calls.append(Call(path, index, (Part("past"),), batch, time, [start], [final]))
        return result


def _last(kept: Tensor, frames: int, length: Any, lens: Tensor | None) -> Tensor:
    """The last frames of each row, (batch, frames * rest), of `kept` (batch, more + length, ...)."""
    if lens is None:
        return kept[:, -frames:].flatten(1)
    more = kept.shape[1] - length
    steps = (lens + more - frames).unsqueeze(1) + count_up(frames)
    if isinstance(kept.shape[0], int) and kept.shape[0] == 1:
        return kept[:, steps[0]].flatten(1)  # within vmap, `gather` would fix the number of rows
    flat = kept.flatten(2) if kept.dim() > 2 else kept.unsqueeze(2)
    return flat.gather(1, steps.unsqueeze(2).expand(-1, -1, flat.shape[2])).flatten(1)
