"""Runs a loop body over the time steps of a sequence: as a Python loop, or as one ONNX Scan in the graph.

After its last step a row keeps its state and its last results.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan as higher_order_scan

from unroll.export.lifting.dataflow import without_observers
from unroll.export.lifting.loop_body import LoopBody
from unroll.export.lifting.state_row import from_row, to_row
from unroll.export.lifting.tape import count_up


@dataclass(frozen=True, slots=True)
class Axes:
    """The batch and time axes of a tensor, if it has them; `shape` is that of one call, and varies along these axes."""

    batch: int | None
    time: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, base: Tensor, wide: Tensor, long: Tensor) -> "Axes | None":
        """Derive from a tensor in three calls: a base, one with another batch size, one with another length."""
        if not base.dim() == wide.dim() == long.dim():
            return None
        batch = [axis for axis in range(base.dim()) if base.shape[axis] != wide.shape[axis]]
        time = [axis for axis in range(base.dim()) if base.shape[axis] != long.shape[axis]]
        if len(batch) > 1 or len(time) > 1 or (batch and batch == time):
            return None
        return cls(batch[0] if batch else None, time[0] if time else None, tuple(base.shape), base.dtype)

    def with_batch(self, batch: Any) -> list[Any]:
        return [batch if axis == self.batch else size for axis, size in enumerate(self.shape)]

    def flat(self, tensor: Tensor) -> Tensor:
        """Flatten to (batch, size) floats, the layout of the state row."""
        rows = tensor.movedim(self.batch or 0, 0)
        return to_row(rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1))

    def unflat(self, rows: Tensor) -> Tensor:
        rest = [size for axis, size in enumerate(self.shape) if axis != self.batch]
        return from_row(rows, self.dtype).reshape(rows.shape[0], *rest).movedim(0, self.batch or 0)


class Scan(nn.Module):
    """Runs a loop body step by step. `inputs`, `outputs` and `states` are the axes of its tensors."""

    def __init__(
        self, step: LoopBody, inputs: list[Axes], outputs: list[Axes], states: list[Axes], backwards: bool = False
    ) -> None:
        super().__init__()
        self.body, self.start, self.finals, self.delay = step.body, step.start, step.finals, step.delay
        self.inputs, self.outputs, self.states, self.backwards = inputs, outputs, states, backwards

    def initial(self, tensors: list[Tensor]) -> list[Tensor]:
        """The module's initial states, as parts of the state row."""
        one = [t if a.time is None else t.narrow(a.time, 0, 1) for t, a in zip(tensors, self.inputs, strict=True)]
        batch = self.size(tensors)[0]
        return [
            axes.flat(state.expand(axes.with_batch(batch)))
            for state, axes in zip(self.start(*one), self.states, strict=True)
        ]

    def forward(
        self, tensors: list[Tensor], parts: list[Tensor], lens: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the loop; returns the module's results and its final state.

        Args:
            tensors: the arguments of the module.
            parts: its state, as parts of the state row.
            lens: (batch,), the length of each row; None if all rows have full length.
        """
        batch, time = self.size(tensors)
        # Carry results without time, too, unless they are states: a row's final result is that of its last step.
        lasts = [
            axes for axes, final in zip(self.outputs, self.finals, strict=True) if axes.time is None and final is None
        ]
        zeros = [axes.flat(torch.zeros(axes.with_batch(batch), dtype=axes.dtype)) for axes in lasts]
        carried = [*self.states, *lasts]
        sequences = [t.movedim(a.time, 0) for t, a in zip(tensors, self.inputs, strict=True) if a.time is not None]
        steps = count_up(time, torch.int32).unsqueeze(1)
        alive = steps < (steps.new_full((batch,), time) if lens is None else lens)

        def once(carry: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            *now, alive = x
            left = iter(now)
            given = [
                tensor if axes.time is None else next(left).unsqueeze(axes.time)
                for tensor, axes in zip(tensors, self.inputs, strict=True)
            ]
            states = [axes.unflat(rows) for axes, rows in zip(self.states, carry, strict=False)]
            made = self.body.forward(*given, *states)  # torch cannot trace hooks within a scan
            results = list(zip(made, self.outputs, self.finals, strict=False))
            after = [*made[len(results) :], *(r for r, axes, final in results if axes.time is None and final is None)]
            rows = (axes.flat(tensor) for axes, tensor in zip(carried, after, strict=True))
            chosen = (
                torch.where(alive.unsqueeze(1), one, other).contiguous()  # as `begin` is
                for one, other in zip(rows, carry[: len(carried)], strict=True)
            )
            each = (r.squeeze(axes.time).clone() for r, axes, _ in results if axes.time is not None)
            return tuple(chosen) or (carry[0] + 0,), tuple(each)

        begin = tuple(rows.contiguous() for rows in [*parts, *zeros]) or (torch.zeros(batch, 1),)
        run = higher_order_scan if torch.compiler.is_exporting() else _run
        with without_observers():
            carry, each = run(once, begin, (*sequences, alive), dim=0, reverse=self.backwards)
        reached = [axes.unflat(rows) for axes, rows in zip(carried, carry, strict=False)]
        stacked, last = iter(each), iter(reached[len(self.states) :])
        results = [
            next(stacked).movedim(0, axes.time)
            if axes.time is not None
            else next(last)
            if final is None
            else reached[final]
            for axes, final in zip(self.outputs, self.finals, strict=True)
        ]
        return results, list(carry[: len(self.states)])

    def size(self, tensors: list[Tensor]) -> tuple[int, int]:
        tensor, axes = next(
            pair for pair in zip(tensors, self.inputs, strict=True) if None not in {pair[1].batch, pair[1].time}
        )
        return tensor.shape[axes.batch], tensor.shape[axes.time]  # type: ignore[index]


def accumulate(step: Callable[[Tensor, Tensor], Tensor], tensor: Tensor, axis: int) -> Tensor:
    """Accumulate along an axis, as itertools.accumulate does: `step` combines the last value and the next element."""
    major = tensor.movedim(axis, 0)

    def once(carry: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        made = step(carry[0], x[0])
        return (made,), (made.clone(),)

    run = higher_order_scan if torch.compiler.is_exporting() else _run
    with without_observers():
        _, (each,) = run(once, (major[0].contiguous(),), (major[1:],), dim=0, reverse=False)
    return each.movedim(0, axis)


def _run(once: Any, carry: Any, sequences: Any, dim: int, reverse: bool) -> tuple[Any, Any]:
    """`higher_order_scan` as a Python loop."""
    each = []
    for t in range(len(sequences[0])):
        t = len(sequences[0]) - 1 - t if reverse else t
        carry, made = once(carry, tuple(sequence[t] for sequence in sequences))
        each.append(made)
    return carry, tuple(torch.stack(tensors) for tensors in zip(*(each[::-1] if reverse else each), strict=True))
