"""Replays recorded calls at any size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from unroll.export.lifting.recording import CannotSplitError, Given, Made, Op, Own, Size, leaves_of, mapped


@dataclass(frozen=True, slots=True)
class Region:
    """One loop: its arguments from outside, its calls at one size, and its results."""

    arguments: list[Any]
    ops: list[Op]
    results: list[Made]


@dataclass(frozen=True, slots=True)
class Program:
    """Calls and loops in order.

    Attributes:
        items: an `Op` for a call, (number, arguments) for a loop, None for an omitted item; `Made` refers to them.
        returned: the results of forward.
    """

    items: list[Any]
    returned: Any

    def __deepcopy__(self, memo: Any) -> "Program":
        return self  # immutable


class Machine:
    """Replays calls at one size."""

    def __init__(self, module: nn.Module, given: Sequence[Any], batch: Any, time: Any) -> None:
        self._module, self._given, self._batch, self._time = module, given, batch, time
        self.results: list[Any] = []

    def value(self, leaf: Any) -> Any:
        if isinstance(leaf, Given):
            return self._given[leaf.index]
        if isinstance(leaf, Own):
            found: Any = self._module
            for name in leaf.name.split("."):
                found = getattr(found, name)
            return found
        if isinstance(leaf, Size):
            return leaf.at(self._batch, self._time)
        if isinstance(leaf, Op):
            return self.call(leaf)
        if isinstance(leaf, Made):
            made = self.results[leaf.number]
            return made if leaf.item is None else made[leaf.item]
        return leaf

    def call(self, op: Op) -> Any:
        args, kwargs = mapped(op.args, self.value)
        if isinstance(op.function, str):
            y, state = self._module.get_submodule(op.function)(*args, **kwargs)
            return (y, *(state if isinstance(state, tuple) else (state,)))
        result = op.function(*args, **kwargs)
        return args[0] if op.function is Tensor.__setitem__ else result


def needed(program: Program) -> set[int]:
    """The indices of the items that the program's results depend on."""
    left = list(_made(program.returned))
    found: set[int] = set()
    while left:
        place = left.pop()
        if place not in found:
            found.add(place)
            item = program.items[place]
            left += _made(item.args if isinstance(item, Op) else item)
    return found


def _made(tree: Any) -> Iterator[int]:
    for leaf in leaves_of(tree):
        if isinstance(leaf, Made):
            yield leaf.number
        elif isinstance(leaf, Op):
            yield from _made(leaf.args)


class Piece(nn.Module):
    """A loop as a module, which runs at the recorded sizes. `regions` is keyed by the number of time steps."""

    def __init__(
        self, owner: nn.Module, regions: dict[int, Region], batch: tuple[int, int], time: tuple[int, int]
    ) -> None:
        super().__init__()
        self._regions, self._batch, self._time = regions, batch, time
        self._names: dict[str, str] = {}
        machine = Machine(owner, [], 0, 0)
        for region in regions.values():
            for own in _owned(region.ops):
                if own.name not in self._names:
                    self._names[own.name] = name = f"own_{len(self._names)}"
                    value = machine.value(own)
                    if isinstance(value, nn.Parameter):
                        self.register_parameter(name, value)
                    else:
                        self.register_buffer(name, value, persistent=False)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        region = self._regions[tensors[self._time[0]].shape[self._time[1]]]
        machine = Machine(self, tensors, tensors[self._batch[0]].shape[self._batch[1]], 0)
        for op in region.ops:
            machine.results.append(machine.call(self._renamed(op)))
        return tuple(machine.value(made) for made in region.results)

    def _renamed(self, op: Op) -> Op:
        def change(leaf: Any) -> Any:
            if isinstance(leaf, Own):
                return Own(self._names[leaf.name])
            return self._renamed(leaf) if isinstance(leaf, Op) else leaf

        return Op(op.function, mapped(op.args, change))


def _owned(ops: list[Op]) -> Iterator[Own]:
    for leaf in leaves_of([op.args for op in ops]):
        if isinstance(leaf, Own):
            yield leaf
        elif isinstance(leaf, Op):
            yield from _owned([leaf])


def replayed(program: Program, structure: Any, results: Any, batch: tuple[int, int], time: tuple[int, int]) -> Any:
    """Make a forward that replays `program`, and calls the modules in `unroll_loops` for its loops."""
    wanted = needed(program)

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        given, called = pytree.tree_flatten((args, kwargs))
        if called != structure:
            raise CannotSplitError("it is called in different ways")
        sizes = (given[index].shape[axis] for index, axis in (batch, time))
        machine = Machine(module, given, *sizes)
        for place, item in enumerate(program.items):
            if place not in wanted:
                machine.results.append(None)
            elif isinstance(item, Op):
                machine.results.append(machine.call(item))
            else:
                loop, arguments = item
                machine.results.append(module.unroll_loops[loop](*map(machine.value, arguments)))
        return pytree.tree_unflatten(list(map(machine.value, program.returned)), results)

    return forward
