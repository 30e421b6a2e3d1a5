"""Watches a lifted model run: which states it asks for, where its axes are, what it starts from."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from unroll.bundle.golden import Arrays
from unroll.bundle.manifest import RESERVED_NAMES
from unroll.export.errors import ExportError, attempt
from unroll.export.lifting import module_state, packed
from unroll.export.lifting.carried_state import Carried, handed_on
from unroll.export.lifting.float64 import converted, double_precision
from unroll.export.lifting.history import Place, Watch, places
from unroll.export.lifting.layers import lift_layers, take_weights
from unroll.export.lifting.loops import lift_loops, refill
from unroll.export.lifting.module_state import Attribute
from unroll.export.lifting.recurrent_arguments import length_arguments, state_arguments
from unroll.export.lifting.state_row import Layout
from unroll.export.lifting.streaming import Arguments, StreamingModule
from unroll.export.lifting.tape import Call, Key, Tape, call_count
from unroll.export.signature.arguments import StateArgument, check_inputs, check_static, resized
from unroll.export.signature.outputs import leaves, parts, plan
from unroll.export.signature.samples import Samples, as_tensors


def lift_model(
    model: nn.Module, example: dict[str, Any], static: frozenset[str], state: Mapping[str, str], batch_first: bool
) -> tuple[StreamingModule, Samples]:
    """Lift `model` in place and sort its arguments. Raises ExportError for a forward that cannot be lifted."""
    attempt("the example", lambda: model(**example))  # computes weights that are normalised
    tape = Tape()
    packings = {name: value for name, value in example.items() if isinstance(value, PackedSequence)}
    others = {name: value for name, value in example.items() if name not in state}
    handed: dict[str, StateArgument] = {}
    if state:
        series = [value for name, value in others.items() if name not in static and isinstance(value, Tensor)]
        if packings or not series or series[0].dim() < 2:
            raise ExportError("input", "a state that is handed on goes with inputs that are (batch, time, ...) tensors")
        batch = series[0].shape[0 if batch_first else 1]
        handed = handed_on(model, example, state, lambda: resized(others, (1, 5), static, batch_first), batch)
    if not packings:

        def run(size: tuple[int, int]) -> Any:
            now = {name: argument.expand(size[0]) for name, argument in handed.items()}
            return attempt("the example", lambda: model(**resized(others, size, static, batch_first), **now))

        lift_loops(model, tape, run)
        module_state.put_back(model)  # loops were traced alone
    lift_layers(model, tape)
    take_weights(model, model)
    sequences = {name: pad_packed_sequence(value, batch_first=True) for name, value in packings.items()}
    example = example | {name: packed.as_argument(*pair) for name, pair in sequences.items()}

    def record(arguments: dict[str, Any]) -> Tape:
        tape.start(None, None)
        with packed.padded(tape):
            attempt("the example", lambda: model(**arguments))
        if not tape.calls and not state:
            raise ExportError("no_recurrent_layer", "forward calls none of the model's recurrent layers")
        return tape

    record(example)
    unbatched = tape.unbatched
    one_by_one = {name: value for name, value in example.items() if name not in {*packings, *static}}
    constants = state_arguments(one_by_one, lambda values: record(example | values).calls, unbatched)
    lengths = length_arguments(one_by_one, lambda values: [one for one, _ in record(example | values).lengths])
    for name in constants.keys() & handed.keys():
        if not _is_layers_own(model, tape, example, name, state[name]):
            raise ExportError(
                "input",
                f"state {name!r} goes to a recurrent layer as its initial state, and {state[name]!r} is not the state "
                "that this layer ends in: hand on the layer's own",
            )
    handed = {name: argument for name, argument in handed.items() if name not in constants}
    if handed and unbatched:
        raise ExportError(
            "unbatched", "forward takes one sequence without a batch: give a state of its own a batch axis"
        )
    known = {*constants, *lengths, *static, *handed}
    rest = {name: value for name, value in example.items() if name not in known}
    rest |= {
        name: padded if batch_first and not unbatched else padded.transpose(0, 1)
        for name, (padded, _) in sequences.items()
    }
    inputs = check_inputs(rest, batch_first, unbatched)
    given = check_static(
        {name: example[name] for name in example if name in static}, len(next(iter(inputs.values()))), unbatched
    )
    samples = Samples(_arrays(inputs), static=_arrays(given))
    carried = {name: (Carried.of_argument(name, argument), state[name]) for name, argument in handed.items()}
    arguments = Arguments(
        list(example),
        list(inputs),
        constants | handed,
        given,
        carried,
        lengths,
        frozenset(packings),
        batch_first,
        unbatched,
    )
    return StreamingModule(model, tape, arguments), samples


def _is_layers_own(model: nn.Module, tape: Tape, example: dict[str, Any], name: str, output: str) -> bool:
    """Is the output the final state of the very call that the argument is the initial state of?"""
    random = pytree.tree_map(torch.randn_like, example[name])
    tape.start(None, None)
    with packed.padded(tape):
        returned = leaves(attempt("the example", lambda: model(**example | {name: random})))
    pairs = [pair for call in tape.calls for pair in zip(call.asked, call.returned, strict=False)]
    given, found = pytree.tree_leaves(random), [returned[index][1] for index in parts(returned, output)]
    return len(given) == len(found) and all(
        any(module_state.same(asked, one) and module_state.same(final, other) for asked, final in pairs)
        for one, other in zip(given, found, strict=True)
    )


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


def _arrays(tensors: dict[str, Tensor]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def in_double(streaming: StreamingModule, exact: nn.Module, samples: Samples) -> StreamingModule:
    """A copy in float64, with the parameters and buffers of `exact`, the user's model in float64."""
    double = converted(streaming, torch.float64)
    for named in (nn.Module.named_parameters, nn.Module.named_buffers):
        own = dict(named(double.model))
        for name, tensor in named(exact):
            own[name].copy_(tensor)
    refill(double.model)
    constants = {
        key: replace(constant, tensors=tuple(t.double() if t.is_floating_point() else t for t in constant.tensors))
        for key, constant in streaming.arguments.constants.items()
    }
    static = as_tensors(samples.draw_static(4, seed=3), double=True)
    double.arguments = replace(streaming.arguments, constants=constants, static=static)
    with double_precision():  # once, since a normalised weight is computed by a forward
        attempt("float64 inputs", lambda: double.record(*as_tensors(samples.draw(2, 6, seed=3), double=True).values()))
    take_weights(double.model, double.model)
    return double


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
