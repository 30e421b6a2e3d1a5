"""Tracks which tensors are computed from the values of the inputs, and holds what other observers of calls share."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

#: Functions that read only the shape of their tensors.
_CREATED = {f"{name}_like" for name in ("zeros", "ones", "full", "empty", "rand", "randn")} | {
    f"new_{name}" for name in ("zeros", "ones", "full", "empty", "tensor")
}

#: Functions that read only the shape or dtype of tensors after the first.
_AS_OTHER = {"to", "type_as", "expand_as", "view_as", "reshape_as"}


class Observer(TorchFunctionMode):
    """A mode that sees forward's calls, except those within a scan: torch cannot trace a scan under such a mode."""


@contextmanager
def without_observers() -> Iterator[None]:
    """Disable the observers on top of the mode stack."""
    if not isinstance(_get_current_function_mode(), Observer):
        yield
        return
    with _pop_mode_temporarily(), without_observers():
        yield


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks at the end."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


class ComputedFrom(TorchFunctionMode):
    """A mode that tracks data flow: `tensor in mode` tells whether it was computed from the values of `inputs`."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        self._found = {id(tensor): tensor for tensor in inputs}

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self._found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        read = args[:1] if name in _AS_OTHER else (args, kwargs)
        if name not in _CREATED and any(leaf in self for leaf in pytree.tree_leaves(read) if isinstance(leaf, Tensor)):
            changed = args[0] if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else None
            for leaf in pytree.tree_leaves((result, changed)):
                if isinstance(leaf, Tensor):
                    self._found[id(leaf)] = leaf
        return result
