"""State that forward leaves in the module for its next call, as `self.h` is: found, and put back after every call.

So every call starts from what the module starts from. Whether the next call of the user's own module then goes on as a
stream would is found out by running it: see `exporter`.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from export.errors import ExportError
from export.outputs import leaves

#: (path of a module, name of its attribute)
Attribute = tuple[str, str]

#: In place of an attribute that there is not yet.
_ABSENT: Any = ...


def changed_by(model: nn.Module, forward: Callable[[], Any]) -> list[Attribute]:
    """The attributes with tensors that calls of `forward` change, unless that is over and makes no difference."""
    seen = [_tensors(model)]
    first = forward()
    seen.append(_tensors(model))
    second = forward()
    seen.append(_tensors(model))
    changed = [{key for key, tensor in new.items() if not same(old.get(key), tensor)} for old, new in pairwise(seen)]
    if not changed[1] and all(same(one, two) for (_, one), (_, two) in zip(leaves(first), leaves(second), strict=True)):
        return []
    return sorted({(path, name) for path, name, _ in changed[0] | changed[1]})


def put_back(model: nn.Module, attributes: list[Attribute]) -> None:
    """Let each call of a module end with its `attributes` as they are now, in copies of `model` too."""
    for path in dict.fromkeys(path for path, _ in attributes):
        module = model.get_submodule(path)
        own = [name for owner, name in attributes if owner == path]
        for name in own:
            # An attribute of the module: what converts the module's tensors converts it.
            setattr(module, f"unroll_first_{name}", getattr(module, name, _ABSENT))
        hook = _PutBack(own)
        module.register_forward_hook(hook)
        module.unroll_put_back = hook  # type: ignore[assignment]


def left(module: nn.Module, name: str) -> Any:
    """What the last call left in an attribute that was put back."""
    hook: _PutBack = module.unroll_put_back  # type: ignore[assignment]
    return hook.left[name]


class _PutBack:
    """A hook after a module's forward."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self.left: dict[str, Any] = {}

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        for name in self._names:
            self.left[name] = getattr(module, name, None)
            first = getattr(module, f"unroll_first_{name}")
            if first is _ABSENT:
                delattr(module, name)
            else:
                setattr(module, name, first)


def names(attributes: list[Attribute]) -> str:
    return ", ".join(repr(".".join(filter(None, attribute))) for attribute in attributes)


def refusal(attributes: list[Attribute]) -> ExportError:
    return ExportError(
        "keeps_state",
        f"forward changes {names(attributes)}, and its next call does not go on as a stream would: state kept "
        "in the module is shared by all clients; return it, or leave it to the recurrent layer",
    )


def same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.shape == other.shape and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


def _tensors(model: nn.Module) -> dict[tuple[str, str, str], Tensor]:
    """Copies of every buffer and plain tensor attribute, by the attribute and where in a tuple, list or dict it is."""
    found = {}
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in _NOT_OWN}
        for name, value in (own | dict(module.named_buffers(recurse=False))).items():
            for key, tensor in _leaves_or_nothing(value):
                found[path, name, key] = tensor.detach().clone()
    return found


#: PyTorch's own attributes of a module.
_NOT_OWN = {*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"}


def _leaves_or_nothing(value: Any) -> list[tuple[str, Tensor]]:
    """The tensors in an attribute; nothing if it holds anything else."""
    try:
        return leaves(value)
    except ExportError:
        return []
