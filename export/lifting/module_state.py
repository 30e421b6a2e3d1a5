"""State that forward leaves in the module for its next call, as `self.h` is: found, and put back after every call.

So every call starts from what the module starts from. Whether the next call of the user's own module then goes on as a
stream would is found out by running it: see `exporter`.
"""

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from unroll.export.errors import ExportError
from unroll.export.lifting.dataflow import Taint
from unroll.export.signature.outputs import first_difference, is_same, leaves

#: (path of a module, name of its attribute)
Attribute = tuple[str, str]

#: In place of an attribute that there is not yet.
_ABSENT: Any = ...


def find_module_state(model: nn.Module, example: dict[str, Any]) -> list[Attribute]:
    """The attributes through which one call of forward bears on the next. `model` is not changed.

    They hold what is computed from the inputs, or do not come to rest; what no later call reads is none of them.
    """
    model, other = copy.deepcopy(model), _another_example(example)
    taint = Taint(tuple(leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)))
    seen = [_values(model)]
    with taint:
        first = model(**example)
    computed = {(path, name) for path, name, _, tensor in _tensors(model) if tensor in taint}
    seen.append(_values(model))
    for inputs in (other, example):
        again = model(**inputs)
        seen.append(_values(model))
    changed = [{key for key, value in new.items() if not is_same(old.get(key), value)} for old, new in pairwise(seen)]
    if first_difference(first, again) is None:
        del changed[0]  # as a table is that is made once
    found = computed | {(path, name) for keys in changed for path, name, _ in keys}
    return sorted(attribute for attribute in found if _is_read(model, attribute, example))


def _another_example(example: dict[str, Any]) -> dict[str, Any]:
    """With rows and steps in another order."""
    if any(isinstance(value, PackedSequence) for value in example.values()):
        return example
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.flip([*range(tensor.dim())][:2]), example)


def _is_read(model: nn.Module, attribute: Attribute, example: dict[str, Any]) -> bool:
    """Is anything else computed from it, or does another value make a difference?"""
    path, name = attribute
    followed = copy.deepcopy(model)
    value = getattr(followed.get_submodule(path), name)
    with Taint(tuple(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))) as taint:
        returned = followed(**example)
    made = [tensor for *other, _, tensor in _tensors(followed) if tuple(other) != attribute]
    if any(tensor in taint for tensor in [*made, *(tensor for _, tensor in leaves(returned))]):
        return True
    plain, changed = copy.deepcopy(model), copy.deepcopy(model)
    owner = changed.get_submodule(path)
    setattr(owner, name, pytree.tree_map(_another, getattr(owner, name)))
    try:
        return first_difference(plain(**example), changed(**example)) is not None
    except Exception:  # noqa: BLE001 user code: an exception is a difference, too
        return True


def _another(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return value ^ True
    return value + 1 if isinstance(value, (Tensor, int, float)) else value


class PutBack:
    """A hook after the forward of a model: its `attributes` are then what they were at first.

    They are kept in the modules that have them, since what converts a module's tensors converts these, too. left: what
    the last call left in each attribute.
    """

    def __init__(self, model: nn.Module, attributes: list[Attribute]) -> None:
        self._attributes = attributes
        self.left: dict[Attribute, Any] = {}
        for path, name in attributes:
            owner = model.get_submodule(path)
            setattr(owner, _first(name), _rebuilt(getattr(owner, name, _ABSENT)))
        model.register_forward_hook(self)
        model.unroll_put_back = self  # type: ignore[assignment]

    def __call__(self, model: nn.Module, args: Any = (), output: Any = None) -> None:
        for path, name in self._attributes:
            owner = model.get_submodule(path)
            self.left[path, name] = getattr(owner, name, None)
            value = getattr(owner, _first(name))
            if value is not _ABSENT:
                setattr(owner, name, _rebuilt(value))
            elif hasattr(owner, name):
                delattr(owner, name)


def put_back(model: nn.Module) -> None:
    """Now: after a part of the model was called alone, or when a call has failed."""
    if isinstance(hook := getattr(model, "unroll_put_back", None), PutBack):
        hook(model)


def left_by(model: nn.Module, attribute: Attribute) -> Any:
    """What the last call left in an attribute that was put back."""
    hook: PutBack = model.unroll_put_back  # type: ignore[assignment]
    return hook.left[attribute]


def first_of(model: nn.Module, attribute: Attribute) -> Any:
    """What the attribute is at first."""
    path, name = attribute
    return getattr(model.get_submodule(path), _first(name))


def _first(name: str) -> str:
    return f"unroll_first_{name}"


def _rebuilt(value: Any) -> Any:
    """With containers of its own: forward may change what it finds in place."""
    return pytree.tree_map(lambda leaf: leaf, value)


def described(attributes: list[Attribute]) -> str:
    return ", ".join(repr(".".join(filter(None, attribute))) for attribute in attributes)


def refusal(attributes: list[Attribute]) -> ExportError:
    return ExportError(
        "keeps_state",
        f"forward changes {described(attributes)}, and its next call does not go on as a stream would: state kept "
        "in the module is shared by all clients; return it, or leave it to the recurrent layer",
    )


def _values(model: nn.Module) -> dict[tuple[str, str, str], Tensor]:
    """Copies of every buffer, tensor and number, by the attribute and where in a tuple, list or dict it is."""
    return {(path, name, key): tensor.detach().clone() for path, name, key, tensor in _tensors(model)}


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, str, Tensor]]:
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in _NOT_OWN}
        for name, value in (own | dict(module.named_buffers(recurse=False))).items():
            if isinstance(value, (bool, int, float)):
                yield path, name, "", torch.tensor(value)
                continue
            for key, tensor in _leaves_or_nothing(value):
                yield path, name, key, tensor


#: PyTorch's own attributes of a module.
_NOT_OWN = {*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"}


def _leaves_or_nothing(value: Any) -> list[tuple[str, Tensor]]:
    """The tensors in an attribute; nothing if it holds anything else."""
    try:
        return leaves(value)
    except ExportError:
        return []
