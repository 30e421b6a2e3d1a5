"""Follows which tensors are computed from the values of the inputs, for any values; and other observers of calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily
from torch.utils import _pytree as pytree

#: These read only the shape of their tensors.
_CREATED = {f"{name}_like" for name in ("zeros", "ones", "full", "empty", "rand", "randn")} | {
    f"new_{name}" for name in ("zeros", "ones", "full", "empty", "tensor")
}

#: These read only the shape or the dtype of their tensors after the first.
_AS_OTHER = {"to", "type_as", "expand_as", "view_as", "reshape_as"}


class Observer(TorchFunctionMode):
    """Sees the calls of forward, not those within a scan, which torch cannot trace while one is watching."""


@contextmanager
def without_observers() -> Iterator[None]:
    """Within, the observers on top of other modes see nothing."""
    if not isinstance(_get_current_function_mode(), Observer):
        yield
        return
    with _pop_mode_temporarily(), without_observers():
        yield


class ComputedFrom(TorchFunctionMode):
    """Within, `tensor in` this says whether it was computed from the values of `inputs`."""

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
