"""Lifts a model: sorts the arguments of forward, and makes of it a function of the state row, also in float64."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from unroll.bundle.golden import Arrays
from unroll.export.errors import ExportError, attempt
from unroll.export.lifting import module_state, packed
from unroll.export.lifting.carried_state import Carried, handed_on
from unroll.export.lifting.float64 import converted, double_precision
from unroll.export.lifting.layers import lift_layers, take_weights
from unroll.export.lifting.loops import lift_loops, refill
from unroll.export.lifting.recurrent_arguments import length_arguments, state_arguments
from unroll.export.lifting.streaming import Arguments, StreamingModule
from unroll.export.lifting.tape import Tape
from unroll.export.signature.arguments import StateArgument, check_inputs, check_static, resized
from unroll.export.signature.outputs import leaves, parts
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
