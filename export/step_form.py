"""The step form: a module whose forward makes one time step, with its states among its arguments, or kept in itself.

`StepForm` calls it once for each time step of a sequence, in a Python loop. So everything after it, from lifting to
proof, is what it is for a module whose own forward loops.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from unroll.export.errors import ExportError, attempt
from unroll.export.lifting.carried_state import handed_on
from unroll.export.lifting.kept_values import NOT_OWN
from unroll.export.lifting.module_state import Attribute, described
from unroll.export.loading.copies import detached_copy, detached_example
from unroll.export.signature.arguments import DeclaredArguments, StateArgument, alike_rows, check_arguments
from unroll.export.signature.outputs import continuing, first_difference, leaves

#: Of the sequences that are made of the example's steps.
_BATCH, _TIME = 3, 12

#: In place of an attribute that does not exist yet.
_ABSENT: Any = ...


class StepForm(nn.Module):
    """A step over sequences.

    Takes the arguments of the step but the states, each (batch, time, ...), the static ones (batch, ...). Returns the
    outputs of the step but the states, by name, each (batch, time, ...).
    """

    def __init__(
        self,
        step: nn.Module,
        state: dict[str, StateArgument],
        outputs: dict[str, str],
        kept: dict[Attribute, StateArgument],
        static: frozenset[str],
    ) -> None:
        """What a sequence starts from: arguments, of which `outputs` says what continues them; `kept` attributes."""
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
                state = _cloned(state)  # which the step may change in place, and which may be an output as well
                for key in self._kept:
                    _set(self.step, key, _cloned(_get(self.step, key)))
                now = {name: value[:, t] if name in series else value for name, value in inputs.items()}
                state, outputs = self._sorted(leaves(self.step(**now, **state)), state)
                state = _cloned(state)  # so that this step makes what the next one is handed, also of an input alone
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
    """The step form of a module, and example sequences for it.

    Args:
        step: its forward takes (batch, ...) inputs, and its states.
        example: the arguments of one step; a state that is not among them is zeros, if forward starts so without it.
        declared: its `state` is empty if the module keeps its state itself.

    Raises:
        ExportError: input, or keeps_state for what the module keeps without a row for each client.
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
            "a step without a state: the module keeps none, and none is named; name the arguments that are states, and "
            "the outputs that continue them, as in --state h:float32:64=y1 or state={'h': 'y1'}",
        )
    rows = torch.arange(_BATCH * _TIME) % batch
    sequences = {
        name: value[rows[:_BATCH]] if name in declared.static else value[rows].unflatten(0, (_BATCH, _TIME))
        for name, value in given.items()
    }
    named = type(type(step).__name__, (StepForm,), {})  # as messages call it
    return named(step, state, dict(outputs), kept, declared.static), sequences


def _batch(given: dict[str, Any], static: frozenset[str]) -> int:
    """The batch of the inputs. Raises ExportError(input) unless each has it as its first dimension."""
    tensors = [value for value in given.values() if isinstance(value, Tensor) and value.dim()]
    if len(tensors) < len(given) or not given.keys() - static or len({len(tensor) for tensor in tensors}) != 1:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items() if isinstance(value, Tensor))
        raise ExportError(
            "input",
            f"every input of a single step but its states must be (batch, ...): {shapes or 'there is none'}; name the "
            "states, as in --state h:float32:64=y1 or state={'h': 'y1'}",
        )
    return len(tensors[0])


def _started(step: nn.Module, example: dict[str, Any], name: str, output: str) -> Any:
    """Zeros for a state that is not given, if forward starts from them without it. Raises ExportError(input)."""
    without = _called(detached_copy(step), example)
    value = _outputs(without).get(output)
    zeros = pytree.tree_map_only(Tensor, torch.zeros_like, value)
    if value is None or first_difference(without, _called(detached_copy(step), example | {name: zeros})) is not None:
        raise ExportError(
            "input",
            f"state {name!r} is not in the example inputs, and without it forward does not start from zeros like output"
            f" {output!r}: give its first value",
        )
    return zeros


def _outputs(returned: Any) -> dict[str, Any]:
    """What forward returns, by name, with the tuples and dicts in it left whole."""
    if isinstance(returned, Mapping):
        return {str(key): value for key, value in returned.items()}
    if isinstance(returned, tuple) and hasattr(returned, "_fields"):
        return dict(zip(returned._fields, returned, strict=True))
    return {f"y{index}": value for index, value in enumerate(returned)} if isinstance(returned, (tuple, list)) else {}


def _kept(step: nn.Module, example: dict[str, Any], batch: int, one: dict[str, Any]) -> dict[Attribute, StateArgument]:
    """What the module keeps for its next step, each a row for each client.

    Args:
        one: the arguments for a batch of one.

    Raises:
        ExportError: keeps_state.
    """
    tried, seen = detached_copy(step), [_held(step)]
    for arguments in (example, pytree.tree_map_only(Tensor, _other, example)):
        _called(tried, arguments)
        seen.append({key: _cloned(value) for key, value in _held(tried).items()})
    first, before, after = seen
    changed = [key for key, value in after.items() if key not in before or _differs(before[key], value)]
    if not changed:
        _called(detached_copy(step), one)
        return {}
    starts = {key: _start(first.get(key, _ABSENT), after[key]) for key in changed}
    for axes in product(*(alike_rows(tensor, batch) for tensor in pytree.tree_leaves(list(starts.values())))):
        left = iter(axes)
        found = {
            key: StateArgument(tuple(tensors), tuple(next(left) for _ in tensors), structure)
            for key, (tensors, structure) in zip(changed, map(pytree.tree_flatten, starts.values()), strict=True)
        }
        with suppress(ExportError):
            if _stays(step, one, found):
                break
    else:
        raise ExportError(
            "keeps_state",
            f"a step changes {described(changed)}, which has no row for each client of the batch: let forward take it "
            "as an argument and return it",
        )
    _check_starts(step, example, {key: starts[key] for key in changed if key not in first})
    _check_starts(step, one, {key: argument.expand(1) for key, argument in found.items()})
    return found


def _start(first: Any, after: Any) -> Any:
    """What a sequence starts from: `first`, with a row for each client if the first step makes them; or else zeros."""
    if first is _ABSENT:
        return pytree.tree_map(torch.zeros_like, after)
    before, made = _shapes(first), _shapes(after)
    if before == made or len(before) != len(made):
        return first
    with suppress(RuntimeError):
        return pytree.tree_map(lambda tensor, other: tensor.expand_as(other), first, after)
    return first


def _check_starts(step: nn.Module, example: dict[str, Any], starts: dict[Attribute, Any]) -> None:
    """Raises ExportError(keeps_state) unless a new module's first step is one from zeros in place of nothing."""
    tried = detached_copy(step)
    for key, value in starts.items():
        _set(tried, key, _cloned(value))
    if first_difference(_called(tried, example), _called(detached_copy(step), example)) is not None:
        raise ExportError(
            "keeps_state",
            f"{described([*starts])} holds nothing before the first step, or no row for each client, which does not "
            "start from zeros, or from that: let it hold what a sequence starts from when the module is made",
        )


def _stays(step: nn.Module, one: dict[str, Any], found: dict[Attribute, StateArgument]) -> bool:
    """Does a step of one client leave what it keeps in its shape?"""
    tried = detached_copy(step)
    for key, argument in found.items():
        _set(tried, key, _cloned(argument.expand(1)))
    _called(tried, one)
    held = _held(tried)
    return all(_shapes(held.get(key)) == _shapes(argument.expand(1)) for key, argument in found.items())


def _called(step: nn.Module, arguments: dict[str, Any]) -> Any:
    return attempt("the example", lambda: step(**_cloned(arguments)))


def _held(step: nn.Module) -> dict[Attribute, Any]:
    """Every attribute that holds tensors, also in tuples, lists and dicts."""
    return {
        (path, name): value
        for path, module in step.named_modules()
        for name, value in (vars(module) | module._buffers).items()
        if name not in NOT_OWN and (held := pytree.tree_leaves(value)) and all(isinstance(t, Tensor) for t in held)
    }


def _other(value: Tensor) -> Tensor:
    """For the next step: what keeps the input of the step before is seen to change."""
    return value / 2 if value.is_floating_point() else value.roll(1, 0)


def _differs(one: Any, other: Any) -> bool:
    return _shapes(one) != _shapes(other) or first_difference((one,), (other,)) is not None


def _shapes(value: Any) -> list[torch.Size]:
    return [tensor.shape for tensor in pytree.tree_leaves(value)]


def _cloned(values: Any) -> Any:
    """In a row, so that a step which makes its states contiguous does the same each time."""
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
    """The buffer that holds the first value of a state."""
    return f"first_{name.replace('.', '_')}_{index}"
