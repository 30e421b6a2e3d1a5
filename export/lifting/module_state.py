"""State that forward leaves in the module for its next call, such as `self.h`.

The state is found, and restored after every call, so that every call starts from the module's own initial state.
`verification.original` checks that the next call of the user's module continues the sequence.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from unroll.export.errors import ExportError
from unroll.export.lifting.dataflow import ComputedFrom
from unroll.export.lifting.kept_values import NOT_OWN, check_nothing_counted, kept_values
from unroll.export.signature.outputs import first_difference, is_same, leaves
from unroll.export.source_lines import source_line

#: (path of a module, name of its attribute)
Attribute = tuple[str, str]

#: The value of an attribute that does not exist yet.
_ABSENT: Any = ...


def find_module_state(model: nn.Module, example: dict[str, Any], static: frozenset[str]) -> list[Attribute]:
    """Find the attributes through which one call of forward affects the next. `model` is not modified.

    They hold values computed from the inputs, or change with every call; and a later call reads them.

    Args:
        model: the user's model.
        example: the arguments of forward.
        static: the names of inputs without time.

    Raises:
        ExportError: keeps_state, for non-tensor values that depend on more than one call.
    """
    model, other = copy.deepcopy(model), _another_example(example, static)
    from_inputs = ComputedFrom(tuple(leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)))
    seen = [_values(model)]
    with from_inputs:
        first = model(**example)
    computed = {(path, name) for path, name, _, tensor in _tensors(model) if tensor in from_inputs}
    seen.append(_values(model))
    kept = [kept_values(model)]
    for inputs in (other, example):
        again = model(**inputs)
        seen.append(_values(model))
        kept.append(kept_values(model))
    model(**example)
    check_nothing_counted([*kept, kept_values(model)])
    changed = [{key for key, value in new.items() if not is_same(old.get(key), value)} for old, new in pairwise(seen)]
    if first_difference(first, again) is None:
        del changed[0]  # only the first call makes it, like a table
    found = computed | {(path, name) for keys in changed for path, name, _ in keys}
    return sorted(attribute for attribute in found if is_read(model, attribute, lambda tried: tried(**example)))


def find_fitted(model: nn.Module, runs: Sequence[Callable[[nn.Module], Any]]) -> list[Attribute]:
    """Find attributes that forward adapts to the batch size or length: tensors that change shape, or numbers.

    Args:
        model: the user's model; not modified.
        runs: each calls a model's forward with inputs of another size.

    Raises:
        ExportError: not_exportable, for a buffer that forward resizes in place.
    """
    tried, seen = copy.deepcopy(model), []
    for run in runs:
        try:
            with _RefuseResizing(tried):
                run(tried)
        except ExportError as error:
            raise ExportError(error.code, f"{error}{source_line(error)}") from error
        except Exception:  # noqa: BLE001, S112 user code: a later check has a clearer message
            continue
        sizes = {(path, name, key): tuple(t.shape) or t.item() for path, name, key, t in _tensors(tried)}
        seen.append(set(sizes.items()))
    return sorted({(path, name) for one, other in pairwise(seen) for (path, name, _), _ in one ^ other})


class _RefuseResizing(TorchFunctionMode):
    """Refuses in-place resizing of the model's tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {Tensor.resize_, Tensor.resize_as_, Tensor.set_}:
            for path, name, _, tensor in _tensors(self._model):
                if tensor is args[0]:
                    raise ExportError(
                        "not_exportable",
                        f"forward changes the size of {described([(path, name)])} in place, which a graph cannot do; "
                        f"assign a new tensor to it instead, as with new_zeros",
                    )
        return func(*args, **(kwargs or {}))


def _another_example(example: dict[str, Any], static: frozenset[str]) -> dict[str, Any]:
    """The example with rows and steps reversed."""
    if any(isinstance(value, PackedSequence) for value in example.values()):
        return example

    def flipped(value: Any, axes: int) -> Any:
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.flip([*range(tensor.dim())][:axes]), value)

    return {name: flipped(value, 1 if name in static else 2) for name, value in example.items()}


def is_read(model: nn.Module, attribute: Attribute, run: Callable[[nn.Module], Any]) -> bool:
    """Does `run` compute a tensor from the model's attribute, or does its value affect the result?"""
    path, name = attribute
    followed = copy.deepcopy(model)
    value = getattr(followed.get_submodule(path), name)
    with ComputedFrom(tuple(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))) as computed:
        returned = run(followed)
    made = [tensor for *other, _, tensor in _tensors(followed) if tuple(other) != attribute]
    if any(tensor in computed for tensor in [*made, *(tensor for _, tensor in leaves(returned))]):
        return True
    plain, changed = copy.deepcopy(model), copy.deepcopy(model)
    owner = changed.get_submodule(path)
    setattr(owner, name, pytree.tree_map(_another, getattr(owner, name)))
    try:
        return first_difference(run(plain), run(changed)) is not None
    except Exception:  # noqa: BLE001 user code: an exception also counts as a difference
        return True


def _another(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return value ^ True
    return value + 1 if isinstance(value, (Tensor, int, float)) else value


class RestoreAttributes:
    """A hook that restores attributes of a model after each forward.

    The initial values are stored in the owning modules, so that code that converts a module's tensors converts them,
    too. `left` holds the value that the last call left in each attribute.
    """

    def __init__(self, model: nn.Module, attributes: list[Attribute]) -> None:
        self._attributes = attributes
        self.left: dict[Attribute, Any] = {}
        for path, name in attributes:
            owner = model.get_submodule(path)
            setattr(owner, _first(name), _rebuilt(getattr(owner, name, _ABSENT)))
        model.register_forward_hook(self)
        model.unroll_restore = self  # type: ignore[assignment]

    def __call__(self, model: nn.Module, args: Any = (), output: Any = None) -> None:
        for path, name in self._attributes:
            owner = model.get_submodule(path)
            self.left[path, name] = getattr(owner, name, None)
            value = getattr(owner, _first(name))
            if value is not _ABSENT:
                setattr(owner, name, _rebuilt(value))
            elif hasattr(owner, name):
                delattr(owner, name)


def restore_attributes(model: nn.Module) -> None:
    """Restore the attributes now: after a direct call of a submodule, or after a failed call."""
    if isinstance(hook := getattr(model, "unroll_restore", None), RestoreAttributes):
        hook(model)


def left_by(model: nn.Module, attribute: Attribute) -> Any:
    """The value that the last call left in an attribute."""
    hook: RestoreAttributes = model.unroll_restore  # type: ignore[assignment]
    return hook.left[attribute]


def first_of(model: nn.Module, attribute: Attribute) -> Any:
    """The initial value of an attribute."""
    path, name = attribute
    return getattr(model.get_submodule(path), _first(name))


def _first(name: str) -> str:
    return f"unroll_first_{name}"


def _rebuilt(value: Any) -> Any:
    """Copy the containers but not the tensors, since forward may modify a container in place."""
    return pytree.tree_map(lambda leaf: leaf, value)


def described(attributes: list[Attribute]) -> str:
    return ", ".join(repr(".".join(filter(None, attribute))) for attribute in attributes)


def refusal(attributes: list[Attribute]) -> ExportError:
    return ExportError(
        "keeps_state",
        f"forward changes {described(attributes)}, but its next call does not continue the sequence. All clients share "
        "attributes: return the state and take it as an argument, or use the recurrent layer's own state",
    )


def _values(model: nn.Module) -> dict[tuple[str, str, str], Tensor]:
    """Copies of every buffer, tensor and number, by attribute and position in its container."""
    return {(path, name, key): tensor.detach().clone() for path, name, key, tensor in _tensors(model)}


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, str, Tensor]]:
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in NOT_OWN}
        for name, value in (own | dict(module.named_buffers(recurse=False))).items():
            if isinstance(value, (bool, int, float)):
                yield path, name, "", torch.tensor(value)
                continue
            for key, tensor in _leaves_or_nothing(value):
                yield path, name, key, tensor


def _leaves_or_nothing(value: Any) -> list[tuple[str, Tensor]]:
    """The tensors in an attribute; empty if it holds anything else."""
    try:
        return leaves(value)
    except ExportError:
        return []
