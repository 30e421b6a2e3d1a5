"""Runs a lifted model to find the layout of its state row, the axes of its outputs and its initial row."""

from collections.abc import Callable
from dataclasses import dataclass
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
from unroll.export.lifting.history import Place, WatchHistory, places
from unroll.export.lifting.lifted_model import LiftedModel
from unroll.export.lifting.module_state import Attribute
from unroll.export.lifting.squeezes import WatchSqueezes, common
from unroll.export.lifting.state_row import Layout
from unroll.export.lifting.streaming import Named, StreamingModule
from unroll.export.lifting.tape import Call, Key, call_count
from unroll.export.signature.outputs import indices_of, is_same, plan_outputs
from unroll.export.signature.samples import as_tensors

#: (batch, time) of the calls to compare: the base, another batch size, another length.
_SIZES = ((2, 6), (3, 6), (2, 9))


@dataclass(frozen=True, slots=True)
class Observation:
    """The result of `observe`.

    Attributes:
        initial_row: (state_size,) float32, zero where the initial state depends on the inputs.
        dropped_outputs: the names of outputs that only return a final state.
    """

    initial_row: np.ndarray
    dropped_outputs: tuple[str, ...]


def find_carried_attributes(lifted: LiftedModel, attributes: list[Attribute]) -> dict[Attribute, Carried]:
    """Describe the values that forward leaves in these attributes as parts of the state row.

    Attributes without a row per client are omitted, and so are those that hold a recurrent layer's own state.
    """
    if not attributes:
        return {}
    streaming = lifted.single
    left: list[list[Any]] = []
    for size in _SIZES:
        _, calls = _recorded(lifted, size)
        values = [module_state.left_by(streaming.model, attribute) for attribute in attributes]
        # The row already holds the states that recurrent layers return.
        returned = [tensor for call in calls for tensor in call.returned]
        left.append([None if _is_among(value, returned) else value for value in values])
    found = {}
    for attribute, found_there in zip(attributes, zip(*left, strict=True), strict=True):
        first = module_state.first_of(streaming.model, attribute)
        if carried := Carried.of_attribute(".".join(filter(None, attribute)), first, list(found_there)):
            found[attribute] = carried
    return found


def _recorded(lifted: LiftedModel, size: tuple[int, int]) -> tuple[Named, list[Call]]:
    """Run forward at a size (batch, time); returns its result and the calls of its layers."""
    batch, time = size
    tensors = as_tensors(lifted.samples.draw(batch, time, seed=11), double=False)
    return attempt(f"{batch} sequences of {time} time steps", partial(lifted.single.record, *tensors.values()))


def _is_among(value: Any, tensors: list[Tensor]) -> bool:
    leaves = pytree.tree_leaves(value)
    return all(isinstance(leaf, Tensor) and any(is_same(leaf, one) for one in tensors) for leaf in leaves)


def keep_squeezes(lifted: LiftedModel) -> None:
    """Make `squeeze()` drop the same axes for one sequence or one time step as for several, in both precisions."""
    lifted.single.squeezes = lifted.double.squeezes = common(_watched(lifted, WatchSqueezes))


def _watched(lifted: LiftedModel, mode: Callable[[], Any]) -> list[Any]:
    """Run forward at each size under a fresh mode; returns what each mode has seen."""
    seen = []
    for size in _SIZES:
        lifted.single.watch = watch = mode()
        _recorded(lifted, size)
        seen.append(watch.seen)
    lifted.single.watch = None
    return seen


def find_history(lifted: LiftedModel) -> list[Place | None]:
    """Where forward needs earlier time steps outside its recurrent layers; empty if nowhere."""
    base, wide, long = _watched(lifted, WatchHistory)
    found = [] if lifted.single.arguments.unbatched else places(base, wide, long, _SIZES[0][1], _SIZES[2][1])
    return found if any(found) else []


def observe(lifted: LiftedModel, output_names: list[str] | None) -> Observation:
    """Fill in the layout of the state row and the outputs, in both precisions.

    Args:
        lifted: the lifted model.
        output_names: names of the outputs in forward's order; default names if None.

    Raises:
        ExportError: calls_depend_on_time, layer_axes or output.
    """
    streaming, double = lifted.single, lifted.double
    streaming.tape.computed = double.tape.computed = frozenset()
    streaming.tape.computed = double.tape.computed = _computed_starts(lifted)
    recorded = {size: _recorded(lifted, size) for size in _SIZES}
    frames = {size: named for size, (named, _) in recorded.items()}
    calls_at = {size: calls for size, (_, calls) in recorded.items()}
    streaming.layout = double.layout = _layout(calls_at)
    base = frames[_SIZES[0]]
    dropped = _final_states([tensor for _, tensor in base], calls_at[_SIZES[0]])
    for _, output in streaming.arguments.carried.values():
        dropped |= set(indices_of(base, output))
    if len(dropped) == len(base):
        dropped = set()
    streaming.outputs = double.outputs = plan_outputs(frames, dropped, output_names)
    _check_names(streaming)
    return Observation(_initial_row(lifted), tuple(base[index][0] or "y" for index in sorted(dropped)))


def _final_states(tensors: list[Tensor], calls: list[Call]) -> set[int]:
    """The indices of tensors that are a layer's final state, exactly as the layer returned it."""
    states = [state for call in calls for state in call.returned]
    return {
        index
        for index, tensor in enumerate(tensors)
        if any(tensor is s or (tensor.data_ptr() == s.data_ptr() and tensor.shape == s.shape) for s in states)
    }


def _layout(calls_at: dict[tuple[int, int], list[Call]]) -> Layout:
    """Determine the layout, which must be the same at every batch size and length.

    Raises:
        ExportError: calls_depend_on_time, layer_axes, or no_recurrent_layer if forward carries no state.
    """
    layouts = [Layout.of(calls) for calls in calls_at.values()]
    for (batch, calls), layout in zip(((size[0], calls) for size, calls in calls_at.items()), layouts, strict=True):
        if layout != layouts[0]:
            raise call_count(calls[-1].module, by_batch=batch != _SIZES[0][0])
    for (batch, time), calls in calls_at.items():
        _check_axes(calls, batch, time)
    if all(slot.kind == "static" for slot in layouts[0].slots):
        raise ExportError(
            "no_recurrent_layer",
            "forward carries no state from one time step to the next: it has no nn.LSTM, nn.GRU or nn.RNN, no Python "
            "loop over time, and no convolution, delay or cumsum that looks only back (a mean over time looks ahead). "
            "If it computes all time steps at once, as with fft or a parallel scan, write it as a loop over them, as "
            "h = a[:, t] * h + b[:, t], or export a forward of one step with --step",
        )
    return layouts[0]


def _check_axes(calls: list[Call], batch: int, time: int) -> None:
    for call in calls:
        if any(part.kind == "static" for part in call.parts):
            continue
        if (call.batch, call.time) == (time, batch):
            raise ExportError(
                "layer_axes",
                f"layer {call.module!r} treats the batch as time: it expects (time, batch, ...). Build it with "
                "batch_first=True; or, if forward expects (time, batch, ...), too, export with batch_first=False",
            )
        if (call.batch, call.time) != (batch, time):
            remedy = ""
            if call.batch == batch and call.time < time:
                remedy = (
                    ". Pad the beginning where convolutions shorten it, or pass the frames of a step as one step. What "
                    "runs at every fourth step is a cell in a loop with a count: slow = torch.where(n % 4 == 0, "
                    "cell(step, slow), slow)"
                )
            elif rate := _dilation(call, batch, time):
                remedy = (
                    f". If it is dilated by {rate}, loop over the steps, and use the state from {rate} steps before: "
                    f"hs = [zeros] * {rate}, and for each step hs.append(cell(step, hs[-{rate}]))"
                )
            raise ExportError(
                "layer_axes",
                f"layer {call.module!r} gets {call.batch} sequences of {call.time} steps, but the model gets {batch} "
                f"of {time}; for one state per client, every recurrent layer needs the model's batch and time{remedy}",
            )


def _dilation(call: Call, batch: int, time: int) -> int:
    """How many parts of the time are sequences of their own in the batch of a call; 0 if none are."""
    rate, odd = divmod(call.batch, batch)
    return 0 if odd or rate < 2 or call.time != -(-time // rate) else rate


def _computed_starts(lifted: LiftedModel) -> frozenset[Key]:
    """The calls with an initial state that forward computes from its inputs, so that it differs between sequences."""
    first: dict[Key, Tensor] = {}
    computed = set()
    for size in ((1, 6), (3, 6), (2, 9)):
        for call in _calls(lifted, *size):
            rows, key = torch.cat(call.start, 1), (call.module, call.index)
            base = first.setdefault(key, rows[:1])
            if (rows - base).abs().max() > 1e-12 or key in lifted.double.tape.computed_starts:
                computed.add(key)
    return frozenset(key for key in computed if not key[0].startswith("input "))


def _initial_row(lifted: LiftedModel) -> np.ndarray:
    """The initial row (state_size,) float32, zero where the initial state depends on the inputs."""
    double = lifted.double
    row = double.layout.pack(_calls(lifted, 1, 6), start=True)[0]
    for slot in double.layout.slots:
        if slot.kind == "static" or (slot.module, slot.call) in double.tape.computed:
            row[slot.offset : slot.offset + slot.size] = 0.0
        if not torch.isfinite(row[slot.offset : slot.offset + slot.size]).all():
            raise ExportError(
                "initial_state",
                f"the state of {slot.module!r} starts with infinity or NaN, which a client's state must not hold; "
                "start with a large number instead, such as -1e30 for -inf",
            )
    return row.numpy().astype(np.float32)


def _calls(lifted: LiftedModel, batch: int, time: int) -> list[Call]:
    tensors = as_tensors(lifted.samples.draw(batch, time, seed=22), double=True)
    with double_precision():
        return attempt(f"{batch} sequences of {time} time steps", partial(lifted.double.record, *tensors.values()))[1]


def _check_names(streaming: StreamingModule) -> None:
    names = [*streaming.names, *streaming.arguments.static, *(output.spec.name for output in streaming.outputs)]
    if len(set(names)) != len(names) or RESERVED_NAMES & set(names):
        raise ExportError(
            "output",
            f"names of inputs and outputs repeat, or the bundle uses them: {', '.join(names)}; give output_names",
        )
