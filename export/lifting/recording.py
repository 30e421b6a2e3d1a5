"""Records the calls of one forward, and where the tensors of each call come from."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from unroll.export.lifting.dataflow import hooked

#: Calls that create a tensor from sizes only. A program repeats such a call wherever its result is used.
CREATORS = {
    *("tensor", "zeros", "ones", "full", "empty", "arange"),
    *(f"{name}_like" for name in ("zeros", "ones", "full", "empty")),
    *(f"new_{name}" for name in ("tensor", "zeros", "ones", "full", "empty")),
}


class CannotSplitError(Exception):
    """A forward cannot be split; the message says why."""


@dataclass(frozen=True, slots=True)
class Given:
    """An argument."""

    index: int


@dataclass(frozen=True, slots=True)
class Own:
    """A parameter, a buffer, or another tensor of the module."""

    name: str


@dataclass(frozen=True, slots=True)
class Made:
    """The result of call or loop `number`, or item `item` of that result."""

    number: int
    item: int | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """A number that depends on the batch and the time."""

    one: int
    batch: int = 0
    time: int = 0
    both: int = 0

    def at(self, batch: Any, time: Any) -> Any:
        return self.one + self.batch * batch + self.time * time + self.both * batch * time


@dataclass(frozen=True, slots=True)
class Op:
    """One call of a function, or of the layer at a path. `raw` counts all calls before it."""

    function: Any
    args: Any
    key: Any = field(default=None, compare=False)
    raw: int = field(default=0, compare=False)

    @property
    def creates(self) -> bool:
        return getattr(self.function, "__name__", "") in CREATORS


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every leaf of nested tuples, lists, dicts and slices."""
    if isinstance(value, (tuple, list)):
        items = [mapped(item, change) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(mapped(item, change) for item in (value.start, value.stop, value.step)))
    return change(value)


def leaves_of(value: Any) -> list[Any]:
    found: list[Any] = []
    mapped(value, found.append)
    return found


class Recorder(TorchFunctionMode):
    """Records the calls of one forward."""

    def __init__(self, module: nn.Module, given: list[Any], layers: list[str]) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.results: list[Any] = []
        self.raw = 0
        self._module, self._paths = module, layers
        self._known: dict[int, tuple[Tensor, Any]] = {}
        for path, inner in module.named_modules():
            named = {**vars(inner), **inner._parameters, **inner._buffers}
            for name, value in named.items():
                if isinstance(value, Tensor):
                    self._known[id(value)] = value, Own(f"{path}.{name}".lstrip("."))
        self.given = given
        self._known |= {id(t): (t, Given(index)) for index, t in enumerate(given) if isinstance(t, Tensor)}
        self._inside = False

    def run(self, args: Any, kwargs: Any) -> Any:
        """Run forward; returns references to the tensors of its result."""
        layers = [(path, self._module.get_submodule(path)) for path in self._paths]
        handles = [layer.register_forward_pre_hook(self._enter) for _, layer in layers]
        handles += [layer.register_forward_hook(self._leave(path), with_kwargs=True) for path, layer in layers]
        with hooked(handles), torch.no_grad(), self:
            returned = self._module.forward(*args, **kwargs)
        return [self._reference(leaf) for leaf in pytree.tree_leaves(returned)]

    def value(self, reference: Any) -> Any:
        """The tensor that a `Made` refers to."""
        made = self.results[reference.number]
        return made if reference.item is None else made[reference.item]

    def _enter(self, *_: Any) -> None:
        self._inside = True

    def _leave(self, path: str) -> Any:
        def hook(layer: Any, args: Any, kwargs: Any, result: Any) -> None:
            self._inside = False
            y, state = result
            flat = (y, *(state if isinstance(state, tuple) else (state,)))
            self._add(path, mapped((args, kwargs), self._reference), flat, self.raw)

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, raw = kwargs or {}, self.raw
        self.raw += 1
        if self._inside:
            return func(*args, **kwargs)
        described = mapped((args, kwargs), self._reference)
        result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in leaves_of(result)):
            self._add(func, described, result, raw)
        elif func is Tensor.__setitem__:
            self._add(func, described, args[0], raw)
        return result

    def _add(self, func: Any, described: Any, result: Any, raw: int) -> None:
        number = len(self.ops)
        # The key includes the parameters: several layers called by one line of code are separate loops.
        owned = tuple(leaf.name for leaf in leaves_of(described) if isinstance(leaf, Own))
        self.ops.append(Op(func, described, (getattr(func, "__name__", func), _where(), owned), raw))
        self.results.append(result)
        for item, leaf in [(None, result)] if isinstance(result, Tensor) else enumerate(result):
            if isinstance(leaf, Tensor):
                self._known[id(leaf)] = leaf, Made(number, item)

    def _reference(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = self._known.get(id(value))
        if known is None or known[0] is not value:
            raise CannotSplitError("it uses a tensor that is no argument, parameter or result")
        return known[1]


def _where() -> tuple[int, ...]:
    """The current instruction of every frame below `Recorder.run`, innermost first."""
    frame, found = sys._getframe(1), list[int]()
    while frame is not None and frame.f_code is not Recorder.run.__code__:
        if frame.f_code.co_filename != __file__:
            found.append(frame.f_lasti)
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)
