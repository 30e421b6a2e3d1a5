"""Watches a lifted model run: which states it takes, where its axes are, what it starts from."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unroll.bundle.manifest import RESERVED_NAMES
from unroll.export.errors import ExportError, attempt
from unroll.export.lifting import module_state
from unroll.export.lifting.carried_state import Carried
from unroll.export.lifting.float64 import double_precision
from unroll.export.lifting.history import Place, Watch, places
from unroll.export.lifting.module_state import Attribute
from unroll.export.lifting.state_row import Layout
from unroll.export.lifting.streaming import StreamingModule
from unroll.export.lifting.tape import Call, Key, call_count
from unroll.export.signature.outputs import parts, plan
from unroll.export.signature.samples import Samples, as_tensors


def find_kept(streaming: StreamingModule, state: list[Attribute], samples: Samples) -> dict[Attribute, Carried]:
    """What forward leaves in these attributes for its next call, as parts of the state row, where that can be."""
    if not state:
        return {}
    left: list[list[Any]] = []
    for batch, time in ((2, 6), (3, 6), (2, 9)):
        tensors = as_tensors(samples.draw(batch, time, seed=11), double=False)
        _, calls = attempt(f"{batch} sequences of {time} time steps", partial(streaming.record, *tensors.values()))
        values = [module_state.left_by(streaming.model, attribute) for attribute in state]
        # What a recurrent layer returned as its state is in the row anyway.
        returned = [tensor for call in calls for tensor in call.returned]
        left.append([None if _is_among(value, returned) else value for value in values])
    found = {}
    for attribute, found_there in zip(state, zip(*left, strict=True), strict=True):
        first = module_state.first_of(streaming.model, attribute)
        if carried := Carried.of_attribute(".".join(filter(None, attribute)), first, list(found_there)):
            found[attribute] = carried
    return found


def _is_among(value: Any, tensors: list[Tensor]) -> bool:
    leaves = pytree.tree_leaves(value)
    return all(isinstance(leaf, Tensor) and any(module_state.same(leaf, one) for one in tensors) for leaf in leaves)


def find_past(streaming: StreamingModule, samples: Samples) -> list[Place | None]:
    """Where forward reaches into the past beside its recurrent layers; nothing if it nowhere does."""
    seen = []
    for batch, time in ((2, 6), (3, 6), (2, 9)):
        tensors = as_tensors(samples.draw(batch, time, seed=11), double=False)
        streaming.watch = Watch()
        attempt(f"{batch} sequences of {time} time steps", partial(streaming.record, *tensors.values()))
        seen.append(streaming.watch.seen)
    streaming.watch = None
    base, wide, long = seen
    found = [] if streaming.arguments.unbatched else places(base, wide, long, time=6)
    return found if any(found) else []


def observe(
    streaming: StreamingModule, double: StreamingModule, samples: Samples, output_names: list[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Fill in the layout and the outputs of both; returns the initial state row and the names of dropped outputs."""
    streaming.tape.computed = double.tape.computed = frozenset()
    streaming.tape.computed = double.tape.computed = _computed_starts(double, samples)
    frames: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
    calls_at: dict[tuple[int, int], list[Call]] = {}
    for batch, time in ((2, 6), (3, 6), (2, 9)):
        tensors = as_tensors(samples.draw(batch, time, seed=11), double=False)
        named, calls = attempt(f"{batch} sequences of {time} time steps", partial(streaming.record, *tensors.values()))
        frames[batch, time], calls_at[batch, time] = named, calls
    streaming.layout = double.layout = _layout(calls_at)
    dropped = _final_states([tensor for _, tensor in frames[2, 6]], calls_at[2, 6])
    names = [name for name, _ in frames[2, 6]]
    for _, output in streaming.arguments.carried.values():
        dropped |= set(parts(frames[2, 6], output))
    if len(dropped) == len(names):
        dropped = set()
    streaming.outputs = double.outputs = plan(frames, dropped, output_names)
    _check_names(streaming)
    return _initial_row(double, samples), [names[index] or "y" for index in sorted(dropped)]


def _final_states(tensors: list[Tensor], calls: list[Call]) -> set[int]:
    """Positions of the tensors that are a layer's final state itself, as the layer returned it."""
    states = [state for call in calls for state in call.returned]
    return {
        index
        for index, tensor in enumerate(tensors)
        if any(tensor is s or (tensor.data_ptr() == s.data_ptr() and tensor.shape == s.shape) for s in states)
    }


def _layout(calls_at: dict[tuple[int, int], list[Call]]) -> Layout:
    """The same at every batch size and length, or ExportError(calls_depend_on_time | layer_axes)."""
    layouts = [Layout.of(calls) for calls in calls_at.values()]
    for calls, layout in zip(calls_at.values(), layouts, strict=True):
        if layout != layouts[0]:
            raise call_count(calls[-1].module)
    for (batch, time), calls in calls_at.items():
        _check_axes(calls, batch, time)
    return layouts[0]


def _check_axes(calls: list[Call], batch: int, time: int) -> None:
    for call in calls:
        if any(part.kind == "static" for part in call.parts):
            continue
        if (call.batch, call.time) == (time, batch):
            raise ExportError(
                "layer_axes",
                f"layer {call.module!r} takes the batch for time: it wants (time, batch, ...). If forward does too, "
                "give the example so and say batch_first=False; otherwise build the layer with batch_first=True",
            )
        if (call.batch, call.time) != (batch, time):
            raise ExportError(
                "layer_axes",
                f"layer {call.module!r} sees {call.batch} sequences of {call.time} steps where the model gets {batch} "
                f"of {time}: a state per client needs the same batch and time in every recurrent layer",
            )


def _computed_starts(double: StreamingModule, samples: Samples) -> frozenset[Key]:
    """The calls whose initial state is not the same for all sequences: forward computes it from its inputs."""
    first: dict[Key, Tensor] = {}
    computed = set()
    for batch, time in ((1, 6), (3, 6), (2, 9)):
        for call in _calls(double, samples, batch, time):
            rows, key = torch.cat(call.start, 1), (call.module, call.index)
            base = first.setdefault(key, rows[:1])
            if (rows - base).abs().max() > 1e-12 or key in double.tape.tainted:
                computed.add(key)
    return frozenset(key for key in computed if not key[0].startswith("input "))


def _initial_row(double: StreamingModule, samples: Samples) -> np.ndarray:
    """(state_size,) float32: what every sequence starts from, zero where that depends on its inputs."""
    row = double.layout.pack(_calls(double, samples, 1, 6), start=True)[0]
    for slot in double.layout.slots:
        if slot.kind == "static" or (slot.module, slot.call) in double.tape.computed:
            row[slot.offset : slot.offset + slot.size] = 0.0
    return row.numpy().astype(np.float32)


def _calls(double: StreamingModule, samples: Samples, batch: int, time: int) -> list[Call]:
    tensors = as_tensors(samples.draw(batch, time, seed=22), double=True)
    with double_precision():
        return attempt("float64 inputs", partial(double.record, *tensors.values()))[1]


def _check_names(streaming: StreamingModule) -> None:
    names = [*streaming.names, *streaming.arguments.static, *(output.spec.name for output in streaming.outputs)]
    if len(set(names)) != len(names) or RESERVED_NAMES & set(names):
        raise ExportError(
            "output",
            f"the names of inputs and outputs repeat or are the bundle's own ({', '.join(names)}); give output_names",
        )
