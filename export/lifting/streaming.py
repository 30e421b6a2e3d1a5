"""The lifted model as one function of (state row, lengths, inputs), which is traced to ONNX and run by the probes."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree

from unroll.bundle.golden import Arrays, RunFunction
from unroll.export.errors import ExportError, attempt
from unroll.export.lifting import module_state, packed, vmap_rules
from unroll.export.lifting.carried_state import Carried
from unroll.export.lifting.dataflow import ComputedFrom
from unroll.export.lifting.float64 import double_precision
from unroll.export.lifting.history import KeepHistory, Place, WatchHistory
from unroll.export.lifting.module_state import Attribute
from unroll.export.lifting.squeezes import KeepSqueezes, Squeezes, WatchSqueezes
from unroll.export.lifting.state_row import Layout
from unroll.export.lifting.tape import Call, Part, Tape, count_up
from unroll.export.signature.arguments import StateArgument
from unroll.export.signature.outputs import Output, continuing, leaves
from unroll.export.signature.samples import as_tensors

Named = list[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of forward, by role.

    Attributes:
        names: all arguments, in order.
        series: inputs with a time axis.
        constants: initial states.
        static: inputs without time, each (rows, ...) as in the example.
        carried: states that forward returns for its next call, each with the name of that output.
        lengths: arguments that hold the length of each row.
        packed: the series that forward takes as a PackedSequence.
        batch_first: forward takes (batch, time, ...).
        unbatched: forward takes one sequence, (time, ...).
    """

    names: list[str]
    series: list[str]
    constants: dict[str, StateArgument] = field(default_factory=dict)
    static: dict[str, Tensor] = field(default_factory=dict)
    carried: dict[str, tuple[Carried, str]] = field(default_factory=dict)
    lengths: frozenset[str] = frozenset()
    packed: frozenset[str] = frozenset()
    batch_first: bool = True
    unbatched: bool = False


class StreamingModule(nn.Module):
    """`forward(state, sequence_lens, *inputs) -> (*outputs, state_out)`, batch first throughout.

    state: (batch, state_size); sequence_lens: (batch,) int32, or None to run PyTorch's own layers instead of the
    operators of the graph; inputs: (batch, time, ...). `observe` fills in `layout` and `outputs`.
    """

    def __init__(self, model: nn.Module, tape: Tape, arguments: Arguments) -> None:
        super().__init__()
        self.model, self.tape, self.arguments = model, tape, arguments
        self.layout = Layout(())
        self.outputs: tuple[Output, ...] = ()
        #: The calls outside recurrent layers that keep earlier time steps in the row.
        self.history: list[Place | None] = []
        #: A mode that observes forward, if any.
        self.watch: WatchHistory | WatchSqueezes | None = None
        #: The axes that calls of `squeeze()` drop.
        self.squeezes: Squeezes = []
        #: Bounds of inputs that the manifest's limits cannot describe, and of the state row.
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}
        #: The attributes that forward leaves for its next call, if they are part of the row: see `carried_state`.
        self.carried_attributes: dict[Attribute, Carried] = {}

    @property
    def names(self) -> list[str]:
        return self.arguments.series

    @property
    def row_by_row(self) -> bool:
        """Does forward run on one sequence at a time? It takes no batch, or counts steps, which differ between rows."""
        return self.arguments.unbatched or any(place is not None and place.counted for place in self.history)

    def forward(self, state: Tensor, sequence_lens: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self.ranges:
            return self._run_rows(state, sequence_lens, inputs)
        tensors = {"state": state} | dict(zip(self.names, inputs, strict=True))
        outside = torch.zeros(state.shape[0], dtype=torch.bool)
        for name, bounds in self.ranges.items():
            given, tensors[name] = tensors[name], tensors[name].clamp(*bounds)
            found = given != tensors[name]
            if sequence_lens is not None and name != "state":
                alive = count_up(found.shape[1]) < sequence_lens.unsqueeze(1)
                found = found & alive.reshape(*alive.shape, *[1] * (found.dim() - 2))
            outside = outside | found.flatten(1).any(1)
        results = self._run_rows(tensors.pop("state"), sequence_lens, tuple(tensors.values()))
        # A value outside its range gives NaN, which the server refuses.
        return tuple(
            torch.where(outside.reshape(-1, *[1] * (result.dim() - 1)), torch.nan, result)
            if result.is_floating_point()
            else result
            for result in results
        )

    def _run_rows(self, state: Tensor, sequence_lens: Tensor | None, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self.row_by_row:
            return self._run(state, sequence_lens, inputs)
        if torch.compiler.is_exporting():
            with vmap_rules.OneByOne():
                return torch.vmap(self._run_row)(state, sequence_lens, *inputs)
        if self.arguments.unbatched:
            lens = [None] * len(state) if sequence_lens is None else list(sequence_lens)
            rows = [self._run_row(*row) for row in zip(state, lens, *inputs, strict=True)]
            return tuple(torch.stack(tensors) for tensors in _across(rows))
        groups = self._equally_far(state)
        parts = [
            self._run(
                state[rows], None if sequence_lens is None else sequence_lens[rows], tuple(x[rows] for x in inputs)
            )
            for rows in groups
        ]
        order = torch.cat(groups).argsort()
        return tuple(torch.cat(tensors)[order] for tensors in _across(parts))

    def _equally_far(self, state: Tensor) -> list[Tensor]:
        """The indices of the rows, grouped by the number of time steps so far."""
        counts = [state[:, slot.offset : slot.offset + slot.size] for slot in self.layout.slots if slot.kind == "count"]
        _, group = torch.cat(counts, 1).long().unique(dim=0, return_inverse=True)
        return [(group == number).nonzero().flatten() for number in range(int(group.max()) + 1)]

    def _run_row(self, state: Tensor, length: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run one sequence: state (state_size,), length (), inputs (time, ...)."""
        if not self.arguments.unbatched:
            inputs = tuple(tensor.unsqueeze(0) for tensor in inputs)
        results = self._run(state.unsqueeze(0), None if length is None else length.unsqueeze(0), inputs)
        return tuple(result.squeeze(0) for result in results)

    def _run(self, state: Tensor, lens: Tensor | None, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        returned, calls = self._call(inputs, self.layout.unpack(state), lens)
        outputs = (output.batch_major(returned[output.index][1]) for output in self.outputs)
        return *outputs, self.layout.pack(calls)

    def record(self, *inputs: Tensor) -> tuple[Named, list[Call]]:
        """Run forward as written, from its own initial state; returns its tensors and the calls of its layers."""
        if not self.arguments.unbatched:
            return self._call(inputs, None, None)
        rows = [self._call(row, None, None) for row in zip(*inputs, strict=True)]
        named = [(one[0][0], torch.cat([tensor for _, tensor in one])) for one in _across(row for row, _ in rows)]
        return named, [_joined(one) for one in _across(calls for _, calls in rows)]

    def _call(self, inputs: tuple[Tensor, ...], given: Any, lens: Tensor | None) -> tuple[Named, list[Call]]:
        self.tape.start(given, lens)
        try:
            batch, time = self._size(inputs)
            with packed.padded(self.tape):
                self._begin(batch, time)
                static = self._static(batch)
                arguments = self.arguments_for(inputs, static, lens)
                returned = self._carrying(arguments, batch, time)
            calls = self.tape.calls
            if lens is None and any((lengths != time).any() for lengths, time in self.tape.lengths):
                raise ExportError(
                    "packed_sequence",
                    "forward packs sequences with lengths that it computes; pass the lengths to forward as an argument",
                )
        except BaseException:
            module_state.restore_attributes(self.model)
            raise
        finally:
            self.tape.start(None, None)
        if self.arguments.unbatched:
            returned = [(name, tensor.unsqueeze(0)) for name, tensor in returned]
        return returned, calls

    def _size(self, inputs: tuple[Tensor, ...]) -> tuple[int, int]:
        """The batch size and length of forward's inputs."""
        first, second = inputs[0].shape[:2]
        return (1, first) if self.arguments.unbatched else (first, second)

    def _begin(self, batch: int, time: int) -> None:
        """Mark in the row that its sequence has begun, if forward computes an initial state from its inputs."""
        if self.tape.computed:
            path = "has begun"
            index, (begun,) = self.tape.begin(path, lambda: [torch.zeros(batch, 1)])
            self.tape.fresh = begun < 0.5
            self.tape.calls.append(Call(path, index, (Part("past"),), batch, time, [begun], [torch.ones_like(begun)]))

    def _carrying(self, arguments: dict[str, Any], batch: int, time: int) -> Named:
        """Call forward with the carried states of the row, and write the states that it returns to the tape."""
        rows = {}
        for name, (carried, _) in self.arguments.carried.items():
            rows[carried], arguments[name] = carried.take(self.tape, batch)
        for (path, name), carried in self.carried_attributes.items():
            rows[carried], value = carried.take(self.tape, batch)
            setattr(self.model.get_submodule(path), name, value)
        mode = KeepHistory(self.tape, self.model, self.history, batch).running() if self.history else nullcontext()
        steady = KeepSqueezes(self.squeezes) if self.squeezes else nullcontext()
        with self._following_inputs(arguments), self.watch or mode, steady:
            result = self.model(**arguments)
        returned = leaves(packed.as_padded(result))
        for carried, output in self.arguments.carried.values():
            state = pytree.tree_unflatten(list(carried.first), carried.structure)
            tensors = [returned[index][1] for index in continuing(returned, output, state)]
            carried.leave(self.tape, rows[carried], tensors, batch, time)
        for (path, name), carried in self.carried_attributes.items():
            tensors = pytree.tree_leaves(module_state.left_by(self.model, (path, name)))
            carried.leave(self.tape, rows[carried], tensors, batch, time)
        return returned

    def _following_inputs(self, arguments: dict[str, Any]) -> AbstractContextManager[Any]:
        """Track which tensors forward computes from its inputs, while it is recorded."""
        if self.tape.given is not None:
            return nullcontext()
        fixed = self.arguments.constants.keys() - self.arguments.carried.keys()
        inputs = pytree.tree_leaves([value for name, value in arguments.items() if name not in fixed])
        computed = ComputedFrom(tuple(tensor for tensor in inputs if isinstance(tensor, Tensor)))
        self.tape.from_inputs, self.tape.computed_starts = computed, set()
        return computed

    def _static(self, batch: int) -> dict[str, Tensor]:
        """The static inputs, each (batch, size): from the state row if there is one, otherwise from the example."""
        found = {}
        for name, example in self.arguments.static.items():
            path, flat = f"input {name}", example.reshape(len(example), -1).to(torch.get_default_dtype())
            index, (row,) = self.tape.begin(path, partial(_rows, flat, batch))
            self.tape.calls.append(Call(path, index, (Part("static"),), 0, 0, [row], [row]))
            found[name] = row
        return found

    def ask(self, model: nn.Module, inputs: tuple[Tensor, ...], state: Tensor) -> Named:
        """Run the user's own `model`; its tensors come in the order of `record`.

        Args:
            model: the user's model.
            inputs: each (batch, time, ...).
            state: (batch, state_size); only its static inputs are used.
        """
        given = self.layout.unpack(state)
        static = {name: given[f"input {name}", 0][0] for name in self.arguments.static}
        if self.arguments.unbatched:
            rows = [leaves(model(**self.arguments_for(row, {}, None))) for row in zip(*inputs, strict=True)]
            return [(one[0][0], torch.stack([tensor for _, tensor in one])) for one in _across(rows)]
        arguments = self.arguments_for(inputs, static, None)
        size, time = inputs[0].shape[:2]
        for name in self.arguments.packed:
            lengths = torch.full((size,), time)
            arguments[name] = pack_padded_sequence(arguments[name].data, lengths, batch_first=True)
        return leaves(model(**arguments))

    def arguments_for(
        self, inputs: tuple[Tensor, ...], static: dict[str, Tensor], lens: Tensor | None
    ) -> dict[str, Any]:
        """Build forward's arguments in its own layout, including states, from inputs (batch, time, ...) or one row."""
        given = self.arguments
        size, time = self._size(inputs)
        arguments: dict[str, Any] = {name: constant.expand(size) for name, constant in given.constants.items()}
        whole = torch.full((size,), time) if lens is None else lens.long()
        arguments |= dict.fromkeys(given.lengths, whole)
        for name, row in static.items():
            example = given.static[name]
            value = row.reshape(row.shape[0], *example.shape[1:])
            arguments[name] = value if example.is_floating_point() else value.round().to(example.dtype)
        for name, tensor in zip(given.series, inputs, strict=True):
            if name in given.packed:
                arguments[name] = packed.as_argument(tensor, whole)
            else:
                arguments[name] = tensor if given.batch_first or given.unbatched else tensor.transpose(0, 1)
        return {name: arguments[name] for name in given.names}


def _rows(tensor: Tensor, count: int) -> list[Tensor]:
    return [tensor[torch.arange(count) % len(tensor)]]


def _across(rows: Any) -> list[tuple[Any, ...]]:
    """Transpose: for each item, its values in all rows."""
    return list(zip(*rows, strict=True))


def _joined(calls: tuple[Call, ...]) -> Call:
    """The same call in several rows as one."""
    return replace(
        calls[0],
        batch=len(calls),
        start=[torch.cat(parts) for parts in _across(call.start for call in calls)],
        final=[torch.cat(parts) for parts in _across(call.final for call in calls)],
        returned=tuple(torch.cat(states) for states in _across(call.returned for call in calls)),
    )


def torch_runner(module: StreamingModule, *, double: bool, ops: bool = False) -> RunFunction:
    """Wrap `module` as a bundle's run function, which raises ExportError(forward_failed) with the sizes of the call.

    Args:
        module: the lifted model.
        double: run in float64 instead of float32.
        ops: run the graph's operators instead of PyTorch's own layers.
    """

    def run(inputs: Arrays, state: np.ndarray, sequence_lens: np.ndarray) -> tuple[Arrays, np.ndarray]:
        tensors = as_tensors(inputs | {"": state}, double=double)
        row = tensors.pop("")
        lens = torch.from_numpy(sequence_lens) if ops else None
        what = f"{len(row)} sequences of {max(sequence_lens)} time steps"
        with double_precision() if double else nullcontext():
            results = attempt(what, lambda: module(row, lens, *tensors.values()))
        *outputs, after = (result.numpy() for result in results)
        return {o.spec.name: array for o, array in zip(module.outputs, outputs, strict=True)}, after

    return run
