"""The step form: a module whose forward computes one time step, with its states as arguments or kept in the module.

`StepForm` calls it once per time step in a Python loop. The rest of export, from lifting to proof, then treats it like
any module that loops.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from unroll.export.errors import ExportError, attempt
from unroll.export.lifting.carried_state import handed_on, state_choices
from unroll.export.lifting.kept_values import NOT_OWN
from unroll.export.lifting.module_state import Attribute, described, is_read
from unroll.export.loading.copies import detached_copy, detached_example
from unroll.export.signature.arguments import DeclaredArguments, StateArgument, check_arguments
from unroll.export.signature.outputs import continuing, first_difference, leaves

#: Size of the sequences made from the example's steps.
_BATCH, _TIME = 3, 12

#: The value of an attribute that does not exist yet.
_ABSENT: Any = ...


class StepForm(nn.Module):
    """Runs a step module over sequences.

    `forward` takes the step's arguments without the states, each (batch, time, ...), static ones (batch, ...). It
    returns the step's outputs without the states, by name, each (batch, time, ...).
    """

    def __init__(
        self,
        step: nn.Module,
        state: dict[str, StateArgument],
        outputs: dict[str, str],
        kept: dict[Attribute, StateArgument],
        static: frozenset[str],
    ) -> None:
        """Register the initial states as buffers.

        Args:
            step: the module that computes one time step.
            state: the initial value of each state argument.
            outputs: the output that continues each state argument.
            kept: the initial value of each attribute that holds state.
            static: the names of inputs without time.
        """
        super().__init__()
        self.step, self._state, self._outputs, self._kept, self._static = step, state, outputs, kept, static
        for name, argument in (state | {".".join(key): argument for key, argument in kept.items()}).items():
            for index, tensor in enumerate(argument.tensors):
                self.register_buffer(_first(name, index), tensor)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        series = inputs.keys() - self._static
        batch, time = inputs[min(series)].shape[:2]
        state = {name: self._begin(name, argument, batch) for name, argument in self._state.items()}
        before = [_get(self.step, key) for key in self._kept]
        for key, argument in self._kept.items():
            _set(self.step, key, self._begin(".".join(key), argument, batch))
        steps = []
        try:
            for t in range(time):
                state = _cloned(state)  # the step may modify it in place, and it may also be an output
                for key in self._kept:
                    _set(self.step, key, _cloned(_get(self.step, key)))
                now = {name: value[:, t] if name in series else value for name, value in inputs.items()}
                state, outputs = self._sorted(leaves(self.step(**now, **state)), state)
                # Clone again: the tensors passed to the next step must be made in this one, even if they are inputs.
                state = _cloned(state)
                for key in self._kept:
                    _set(self.step, key, _cloned(_get(self.step, key)))
                steps.append(outputs)
        finally:
            for key, value in zip(self._kept, before, strict=True):
                _set(self.step, key, value)
        return {name: torch.stack([outputs[name] for outputs in steps], 1) for name in steps[0]}

    def _begin(self, name: str, argument: StateArgument, batch: int) -> Any:
        tensors = tuple(getattr(self, _first(name, index)) for index in range(len(argument.tensors)))
        return replace(argument, tensors=tensors).expand(batch)

    def _sorted(
        self, named: list[tuple[str, Tensor]], state: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The states for the next step, and the other outputs, by name."""
        indices = {name: continuing(named, output, state[name]) for name, output in self._outputs.items()}
        taken = {index for found in indices.values() for index in found}
        following = {
            name: pytree.tree_unflatten([named[index][1] for index in found], self._state[name].structure)
            for name, found in indices.items()
        }
        return following, {name: tensor for index, (name, tensor) in enumerate(named) if index not in taken}


def over_time(
    step: nn.Module, example: dict[str, Any], declared: DeclaredArguments
) -> tuple[StepForm, dict[str, Tensor]]:
    """Wrap a step module in a `StepForm`, and make example sequences for it.

    Args:
        step: its forward takes (batch, ...) inputs and the states.
        example: the arguments of one step. A missing state defaults to zeros, if forward starts from zeros without it.
        declared: the declared arguments; `state` is empty if the module keeps its state itself.

    Raises:
        ExportError: input; or keeps_state, if the module keeps state without a row per client.
    """
    step, example, outputs = detached_copy(step), detached_example(example), declared.state
    check_arguments(step, example)
    given = {name: value for name, value in example.items() if name not in outputs}
    batch = _batch(given, declared.static)
    example |= {name: _started(step, example, name, outputs[name]) for name in outputs.keys() - example.keys()}
    one = {name: value[:1] for name, value in given.items()}
    state = handed_on(detached_copy(step), example, outputs, lambda: one, batch) if outputs else {}
    kept = _kept(step, example, batch, one | {name: argument.expand(1) for name, argument in state.items()})
    if not state and not kept:
        raise ExportError(
            "input",
            "the step has no state: the module keeps none, and none is named; name the arguments that are states, and "
            "the outputs that continue them, as in --state h:float32:64=y1 or state={'h': 'y1'}",
        )
    rows = torch.arange(_BATCH * _TIME) % batch
    sequences = {
        name: value[rows[:_BATCH]] if name in declared.static else value[rows].unflatten(0, (_BATCH, _TIME))
        for name, value in given.items()
    }
    named = type(type(step).__name__, (StepForm,), {})  # messages show the class name
    return named(step, state, dict(outputs), kept, declared.static), sequences


def _batch(given: dict[str, Any], static: frozenset[str]) -> int:
    """The batch size. Raises ExportError(input) unless it is the first dimension of every input."""
    tensors = [value for value in given.values() if isinstance(value, Tensor) and value.dim()]
    if len(tensors) < len(given) or not given.keys() - static or len({len(tensor) for tensor in tensors}) != 1:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items() if isinstance(value, Tensor))
        raise ExportError(
            "input",
            f"every input of a single step except its states must be (batch, ...): {shapes or 'there is none'}; name "
            "the states, as in --state h:float32:64=y1 or state={'h': 'y1'}",
        )
    return len(tensors[0])


def _started(step: nn.Module, example: dict[str, Any], name: str, output: str) -> Any:
    """Zeros for a missing state. Raises ExportError(input) unless forward without it starts from zeros."""
    without = _called(detached_copy(step), example)
    value = _outputs(without).get(output)
    zeros = pytree.tree_map_only(Tensor, torch.zeros_like, value)
    if value is None or first_difference(without, _called(detached_copy(step), example | {name: zeros})) is not None:
        raise ExportError(
            "input",
            f"state {name!r} is not in the example inputs, and without it forward does not start from zeros like output"
            f" {output!r}: give its initial value",
        )
    return zeros


def _outputs(returned: Any) -> dict[str, Any]:
    """The outputs of forward by name; nested tuples and dicts are not flattened."""
    if isinstance(returned, Mapping):
        return {str(key): value for key, value in returned.items()}
    if isinstance(returned, tuple) and hasattr(returned, "_fields"):
        return dict(zip(returned._fields, returned, strict=True))
    return {f"y{index}": value for index, value in enumerate(returned)} if isinstance(returned, (tuple, list)) else {}


def _kept(step: nn.Module, example: dict[str, Any], batch: int, one: dict[str, Any]) -> dict[Attribute, StateArgument]:
    """Find the attributes that hold state for the next step, with a row per client.

    Args:
        one: the arguments for a batch of one.

    Raises:
        ExportError: keeps_state, if an attribute has no row per client.
    """
    tried, seen = detached_copy(step), [_held(step)]
    for arguments in (example, pytree.tree_map_only(Tensor, _other, example)):
        _called(tried, arguments)
        seen.append({key: _cloned(value) for key, value in _held(tried).items()})
    first, before, after = seen
    changed = [
        key
        for key, value in after.items()
        if (key not in before or _differs(before[key], value))
        and is_read(tried, key, partial(_called, arguments=example))
    ]
    if not changed:
        _called(detached_copy(step), one)
        return {}
    starts = {key: _start(first.get(key, _ABSENT), after[key]) for key in changed}
    for found in state_choices(starts, batch):
        with suppress(ExportError):
            if _stays(step, one, found):
                break
    else:
        raise ExportError(
            "keeps_state",
            f"a step changes {described(changed)}, which has no row for each client of the batch: take it as an "
            "argument of forward and return it",
        )
    _check_starts(step, example, {key: starts[key] for key in changed if key not in first})
    _check_starts(step, one, {key: argument.expand(1) for key, argument in found.items()})
    return found


def _start(first: Any, after: Any) -> Any:
    """The initial value: `first`, expanded to a row per client if the first step does so; zeros if it is absent."""
    if first is _ABSENT:
        return pytree.tree_map(torch.zeros_like, after)
    before, made = _shapes(first), _shapes(after)
    if before == made or len(before) != len(made):
        return first
    with suppress(RuntimeError):
        return pytree.tree_map(lambda tensor, other: tensor.expand_as(other), first, after)
    return first


def _check_starts(step: nn.Module, example: dict[str, Any], starts: dict[Attribute, Any]) -> None:
    """Raise ExportError(keeps_state) if setting `starts` changes the result of a new module's first step."""
    tried = detached_copy(step)
    for key, value in starts.items():
        _set(tried, key, _cloned(value))
    if first_difference(_called(tried, example), _called(detached_copy(step), example)) is not None:
        raise ExportError(
            "keeps_state",
            f"{described([*starts])} is empty before the first step, or has no row per client, and the first step does "
            "not start from zeros, or from its value: set it to a sequence's initial state when the module is created",
        )


def _stays(step: nn.Module, one: dict[str, Any], found: dict[Attribute, StateArgument]) -> bool:
    """Does a step with a batch of one preserve the shapes of the kept state?"""
    tried = detached_copy(step)
    for key, argument in found.items():
        _set(tried, key, _cloned(argument.expand(1)))
    _called(tried, one)
    held = _held(tried)
    return all(_shapes(held.get(key)) == _shapes(argument.expand(1)) for key, argument in found.items())


def _called(step: nn.Module, arguments: dict[str, Any]) -> Any:
    return attempt("the example", lambda: step(**_cloned(arguments)))


def _held(step: nn.Module) -> dict[Attribute, Any]:
    """Every attribute that holds only tensors, including tuples, lists and dicts of tensors."""
    return {
        (path, name): value
        for path, module in step.named_modules()
        for name, value in (vars(module) | module._buffers).items()
        if name not in NOT_OWN and (held := pytree.tree_leaves(value)) and all(isinstance(t, Tensor) for t in held)
    }


def _other(value: Tensor) -> Tensor:
    """Another input for the second step, to make an attribute that keeps the previous input change."""
    return value / 2 if value.is_floating_point() else value.roll(1, 0)


def _differs(one: Any, other: Any) -> bool:
    return _shapes(one) != _shapes(other) or first_difference((one,), (other,)) is not None


def _shapes(value: Any) -> list[torch.Size]:
    return [tensor.shape for tensor in pytree.tree_leaves(value)]


def _cloned(values: Any) -> Any:
    """Clone as contiguous, so that a step that makes its states contiguous does the same every time."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.clone(memory_format=torch.contiguous_format), values)


def _get(step: nn.Module, attribute: Attribute) -> Any:
    path, name = attribute
    return getattr(step.get_submodule(path), name, _ABSENT)


def _set(step: nn.Module, attribute: Attribute, value: Any) -> None:
    path, name = attribute
    if value is _ABSENT:
        delattr(step.get_submodule(path), name)
    else:
        setattr(step.get_submodule(path), name, value)


def _first(name: str, index: int) -> str:
    """The name of the buffer that holds a tensor of a state's initial value."""
    return f"first_{name.replace('.', '_')}_{index}"
