"""Lifts a model: classifies forward's arguments, and turns forward into a function of the state row."""

from contextlib import suppress
from dataclasses import replace
from functools import partial
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
from unroll.export.lifting.folding import fold_weights
from unroll.export.lifting.functional_layers import lift_functions
from unroll.export.lifting.layers import lift_layers, recognise_layers, split_time_steps, take_weights
from unroll.export.lifting.lifted_model import LiftedModel
from unroll.export.lifting.loops import lift_loops, refill
from unroll.export.lifting.recurrent_arguments import length_arguments, state_arguments
from unroll.export.lifting.streaming import Arguments, StreamingModule
from unroll.export.lifting.tape import Tape
from unroll.export.signature.arguments import DeclaredArguments, StateArgument, check_inputs, check_static, resized
from unroll.export.signature.outputs import continuing, is_same, leaves
from unroll.export.signature.samples import Samples, as_tensors


def lift(model: nn.Module, exact: nn.Module, example: dict[str, Any], declared: DeclaredArguments) -> LiftedModel:
    """Lift `model` in place, classify its arguments, and make a copy in float64.

    Args:
        model: a copy of the user's model in float32.
        exact: the same model in float64.
        example: the arguments of forward.
        declared: the user's declarations about them.

    Raises:
        ExportError: for a forward that cannot be lifted.
    """
    attempt("the example", lambda: model(**example))  # computes normalised weights
    lifter = _Lifter(model, example, declared)
    single, samples = lifter.lift()
    double = _in_float64(single, exact, samples)
    fold_weights(single, double)
    return LiftedModel(single, double, samples)


class _Lifter:
    def __init__(self, model: nn.Module, example: dict[str, Any], declared: DeclaredArguments) -> None:
        self._model, self._declared, self._tape = model, declared, Tape()
        self._packings = {name: value for name, value in example.items() if isinstance(value, PackedSequence)}
        #: Each packed input as its padded tensor (batch, time, ...) and its lengths.
        self._padded = {name: pad_packed_sequence(value, batch_first=True) for name, value in self._packings.items()}
        self._original = example
        self._example = example | {name: packed.as_argument(*pair) for name, pair in self._padded.items()}

    def lift(self) -> tuple[StreamingModule, Samples]:
        recognise_layers(self._model)
        handed = self._handed_on()
        if not self._packings:
            self._lift_loops(handed)
        lift_layers(self._model, self._tape)
        take_weights(self._model, self._model)
        if not self._packings:
            with suppress(ExportError):  # a later check has a clearer message
                split_time_steps(self._model, self._tape, partial(self._run, handed))
        self._record({})
        arguments, samples = self._sorted(handed, self._tape.unbatched)
        return StreamingModule(self._model, self._tape, arguments), samples

    def _handed_on(self) -> dict[str, StateArgument]:
        """The declared state arguments, which forward returns for its next call."""
        state, static = self._declared.state, self._declared.static
        if not state:
            return {}
        others = self._without_state()
        series = [value for name, value in others.items() if name not in static and isinstance(value, Tensor)]
        if self._packings or not series or series[0].dim() < 2:
            raise ExportError(
                "input", "`state` needs an input that is a tensor (batch, time, ...), and no packed sequence"
            )
        batch = series[0].shape[0 if self._declared.batch_first else 1]
        return handed_on(self._model, self._original, state, lambda: self._resized((1, 5)), batch)

    def _without_state(self) -> dict[str, Any]:
        return {name: value for name, value in self._original.items() if name not in self._declared.state}

    def _resized(self, size: tuple[int, int]) -> dict[str, Any]:
        return resized(self._without_state(), size, self._declared.static, self._declared.batch_first)

    def _run(self, handed: dict[str, StateArgument], size: tuple[int, int]) -> Any:
        now = {name: argument.expand(size[0]) for name, argument in handed.items()}
        return attempt("the example", lambda: self._model(**self._resized(size), **now))

    def _lift_loops(self, handed: dict[str, StateArgument]) -> None:
        run = partial(self._run, handed)
        example = partial(attempt, "the example", lambda: self._model(**self._original))
        lift_functions(self._model, [example, *[partial(run, size) for size in ((2, 3), (3, 5))]])
        lift_loops(self._model, self._tape, run)
        module_state.restore_attributes(self._model)  # tracing called the loops directly

    def _record(self, values: dict[str, Any]) -> Tape:
        """Run forward on the example with `values` replaced; returns the tape with its calls."""
        self._call(values)
        return self._tape

    def _call(self, values: dict[str, Any]) -> Any:
        self._tape.start(None, None)
        with packed.padded(self._tape):
            return attempt("the example", lambda: self._model(**self._example | values))

    def _sorted(self, handed: dict[str, StateArgument], unbatched: bool) -> tuple[Arguments, Samples]:
        static = self._declared.static
        candidates = {
            name: value for name, value in self._example.items() if name not in self._packings and name not in static
        }
        constants = state_arguments(candidates, lambda values: self._record(values).calls, unbatched)
        lengths = length_arguments(candidates, lambda values: [one for one, _ in self._record(values).lengths])
        handed = self._without_layers_own(handed, constants)
        if handed and unbatched:
            raise ExportError(
                "unbatched", "forward takes one sequence without a batch; with `state` it must take a batch"
            )
        inputs = self._series({*constants, *lengths, *static, *handed}, unbatched)
        batch = len(next(iter(inputs.values())))
        given = check_static({name: value for name, value in self._example.items() if name in static}, batch, unbatched)
        arguments = Arguments(
            names=list(self._example),
            series=list(inputs),
            constants=constants | handed,
            static=given,
            carried={
                name: (Carried.of_argument(name, argument), self._declared.state[name])
                for name, argument in handed.items()
            },
            lengths=lengths,
            packed=frozenset(self._packings),
            batch_first=self._declared.batch_first,
            unbatched=unbatched,
        )
        return arguments, Samples(_arrays(inputs), static=_arrays(given))

    def _without_layers_own(
        self, handed: dict[str, StateArgument], constants: dict[str, StateArgument]
    ) -> dict[str, StateArgument]:
        """Drop states that go to a recurrent layer: the row already holds them, if they also come from that layer."""
        for name in constants.keys() & handed.keys():
            output = self._declared.state[name]
            if not self._is_layers_own(name, output):
                raise ExportError(
                    "input",
                    f"state {name!r} goes to a recurrent layer, but {output!r} is not the final state of this layer; "
                    "return the final state of the layer",
                )
        return {name: argument for name, argument in handed.items() if name not in constants}

    def _is_layers_own(self, name: str, output: str) -> bool:
        """Is the argument the initial state, and the output the final state, of the same call?"""
        random = pytree.tree_map(torch.randn_like, self._example[name])
        returned = leaves(self._call({name: random}))
        pairs = [pair for call in self._tape.calls for pair in zip(call.asked, call.returned, strict=False)]
        given, indices = pytree.tree_leaves(random), continuing(returned, output, random)
        found = [returned[index][1] for index in indices]
        return len(given) == len(found) and all(
            any(is_same(asked, one) and is_same(final, other) for asked, final in pairs)
            for one, other in zip(given, found, strict=True)
        )

    def _series(self, known: set[str], unbatched: bool) -> dict[str, Tensor]:
        """The inputs with a time axis, each (batch, time, ...)."""
        batch_first = self._declared.batch_first
        rest = {name: value for name, value in self._example.items() if name not in known}
        rest |= {
            name: padded if batch_first and not unbatched else padded.transpose(0, 1)
            for name, (padded, _) in self._padded.items()
        }
        return check_inputs(rest, batch_first, unbatched)


def _arrays(tensors: dict[str, Tensor]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _in_float64(streaming: StreamingModule, exact: nn.Module, samples: Samples) -> StreamingModule:
    """Copy the lifted model to float64, with parameters and buffers of `exact`, the user's model in float64."""
    double = converted(streaming, torch.float64)
    for named in (nn.Module.named_parameters, nn.Module.named_buffers):
        own = dict(named(double.model))
        for name, tensor in named(exact):
            if name in own:  # otherwise forward has assigned a weight that has another name
                own[name].copy_(tensor)
    refill(double.model)
    constants = {
        key: replace(constant, tensors=tuple(t.double() if t.is_floating_point() else t for t in constant.tensors))
        for key, constant in streaming.arguments.constants.items()
    }
    static = as_tensors(samples.draw_static(4, seed=3), double=True)
    double.arguments = replace(streaming.arguments, constants=constants, static=static)
    with double_precision():  # one forward computes normalised weights
        attempt(
            "2 sequences of 6 time steps",
            lambda: double.record(*as_tensors(samples.draw(2, 6, seed=3), double=True).values()),
        )
    take_weights(double.model, double.model)
    return double
