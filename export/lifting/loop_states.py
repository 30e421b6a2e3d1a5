"""Finds the states of a loop: the values that an iteration reads from earlier ones, by comparing traces.

An iteration may read a value that an earlier one computed, or a part of an input that belonged to an earlier one. A
value from several iterations back passes through a chain of states, each taking over the previous one's value.
"""

import operator
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

#: Functions that create a tensor from no tensor: where they are called says nothing about a loop.
_CREATED = {
    *(getattr(torch.ops.aten, name) for name in ("zeros", "ones", "full", "empty", "arange", "scalar_tensor")),
    *(getattr(torch.ops.aten, f"{name}_like") for name in ("zeros", "ones", "full", "empty")),
    *(getattr(torch.ops.aten, f"new_{name}") for name in ("zeros", "ones", "full", "empty")),
}

#: Operations that select a part of a tensor. With a single time step the part may be the whole tensor.
_PICKED = {operator.getitem, torch.ops.aten.select.int, torch.ops.aten.slice.Tensor}

#: The source of a tensor: an operation inside or outside the loop, an argument, or an attribute of the module.
Base = tuple[str, Any]

#: The selections that lead from a source to a tensor, the last one first.
Items = tuple[Any, ...]

#: The iteration that computes a tensor, if any; its source; and the selections from it.
Origin = tuple[int | None, Base, Items]


@dataclass(frozen=True, slots=True)
class Iterations:
    """The iterations in a trace: `turns` times `size` operations, starting at operation `first`."""

    first: int
    size: int
    turns: int


@dataclass(frozen=True, slots=True)
class State:
    """One state of a loop.

    Attributes:
        base, items: the source of its value, and the selections from it.
        age: how many iterations ago its value was current.
        before: the index of the state that it takes its next value from; None if it takes a new value.
        begin: its initial value, in the longer trace.
        uses: the (operation, operand) pairs that read it; operations count from the start of the first iteration.
    """

    base: Base
    items: Items
    age: int
    before: int | None
    begin: fx.Node
    uses: list[tuple[int, int]] = field(default_factory=list)


class Trace:
    """A traced module as a list of tensor operations; the last one is its output."""

    def __init__(self, graph: fx.Graph) -> None:
        self.operations = [node for node in graph.nodes if _is_operation(node)]
        self.names = [node.target for node in self.operations]
        self._nodes = list(graph.nodes)
        self._place = {node: index for index, node in enumerate(self.operations)}

    def origin(self, node: fx.Node, loop: Iterations) -> Origin:
        node, items = source(node)
        place = self._place.get(node)
        if place is None:
            return None, (node.op, "" if node.op == "call_function" else node.target), items
        turn, index = divmod(place - loop.first, loop.size or 1)
        if 0 <= turn < loop.turns and loop.size:
            return turn, ("made", index), items
        return None, ("before" if turn < 0 else "after", place), items

    def find(self, base: Base, first: int) -> fx.Node:
        """The inverse of `origin`, in the trace over one time step."""
        kind, which = base
        if kind in {"made", "before"}:
            return self.operations[which + (first if kind == "made" else 0)]
        return next(node for node in self._nodes if (node.op, node.target) == base)

    def beginning(self, node: fx.Node) -> str:
        """A key for the source of a tensor from outside the loop."""
        node, items = source(node)
        place = self._place.get(node)
        return str((node.target, node.args, items) if place is None else (place, items))


def find_states(single: Trace, long: Trace, loop: Iterations) -> list[State] | None:
    """Find what iterations read from earlier ones; None if the iterations differ.

    Args:
        single: the trace over one time step. Its iteration starts at the same operation as in `long`.
        long: the trace over several time steps.
        loop: the iterations of `long`.
    """
    found, last = _Found(long, loop), loop.first + (loop.turns - 1) * loop.size
    for index, operation in enumerate(single.operations[loop.first :]):
        one = operands(operation)
        if index >= loop.size:
            found.add_after(index, [single.beginning(node) for node in one], operands(long.operations[last + index]))
            continue
        turns = [operands(long.operations[loop.first + turn * loop.size + index]) for turn in range(loop.turns)]
        if any(len(turn) != len(one) for turn in turns):
            return None
        if not all(found.add((index, which), nodes) for which, nodes in enumerate(zip(*turns, strict=True))):
            return None
    return list(found.states.values())


class _Found:
    """The states found so far, keyed by their source and by their initial values."""

    def __init__(self, trace: Trace, loop: Iterations) -> None:
        self.states: dict[tuple[Any, ...], State] = {}
        self._trace, self._loop = trace, loop

    def add(self, use: tuple[int, int], nodes: tuple[fx.Node, ...]) -> bool:
        """Add an operand, given by its node in each iteration. False if the iterations read different ages."""
        delayed = _delayed([self._trace.origin(node, self._loop) for node in nodes])
        if delayed is None:
            return False
        delay, base, items = delayed
        known = [self._trace.beginning(node) for node in nodes[:delay]]
        before: int | None = None
        for age in range(1, delay + 1):
            key = base, items, *known[delay - age :]
            if key not in self.states:
                self.states[key] = State(base, items, age, before, nodes[delay - age])
            before = list(self.states).index(key)
        if delay:
            self.states[key].uses.append(use)
        return True

    def add_after(self, index: int, begins: list[str], nodes: list[fx.Node]) -> None:
        """Add the operands of an operation after the loop; `begins` are its operands after a single iteration."""
        turns = self._loop.turns
        for which, begin in enumerate(begins):
            if len(nodes) == len(begins) * turns:
                each = tuple(nodes[which * turns : (which + 1) * turns])
                _ = self.add((index, which), each) or self.add((index, which), each[::-1])
            elif len(nodes) == len(begins):
                turn, base, items = self._trace.origin(nodes[which], self._loop)
                for key, state in self.states.items():
                    if key[:3] == (base, items, begin) and turn == turns - 1 - state.age:
                        state.uses.append((index, which))


def _delayed(origins: list[Origin]) -> tuple[int, Base, Items] | None:
    """How many iterations ago a value was current, and its source, from its origin in each iteration.

    None if the iterations differ.
    """
    last = len(origins) - 1
    turn, base, items = origins[-1]
    if turn is not None:
        delay = last - turn
        later: list[Origin] = [(now - delay, base, items) for now in range(delay, last + 1)]
    else:
        which, step = _moving(origins[-2], origins[-1])
        start = _start(items[which]) if step else 0
        delay = last - start if step == 1 else start
        if not step or delay <= 0:
            same = all(origin[:2] == (None, base) for origin in origins[1:])
            return (0, base, items) if same and origins[0][0] is None else None
        later = [(None, base, _moved(items, which, step * (now - last))) for now in range(delay, last + 1)]
        items = _moved(items, which, -start)
    if origins[delay:] != later or any(turn is not None for turn, *_ in origins[:delay]):
        return None
    return delay, base, items


def _moving(before: Origin, last: Origin) -> tuple[int, int]:
    """The selection that moves along time, and its step, 1 or -1; (0, 0) if there is none."""
    (_, base, items), (_, other, picks) = last, before
    if base != other or base[0] not in {"placeholder", "before"} or len(items) != len(picks):
        return 0, 0
    steps = [(which, _start(now) - _start(then)) for which, (now, then) in enumerate(zip(items, picks, strict=True))]
    moving = [(which, step) for which, step in steps if step]
    return moving[0] if len(moving) == 1 and abs(moving[0][1]) == 1 else (0, 0)


def _start(pick: tuple[Any, ...]) -> int:
    target, *rest = pick
    start = rest[0 if target is operator.getitem else 1]
    return start if isinstance(start, int) else 0


def _moved(items: Items, which: int, by: int) -> Items:
    """The selections with selection `which` shifted by `by`."""
    target, *rest = items[which]
    bounds = 0 if target is operator.getitem else 1
    moved = (target, *rest[:bounds], *(bound + by for bound in rest[bounds : bounds + 2]), *rest[bounds + 2 :])
    return (*items[:which], moved, *items[which + 1 :])


def _is_operation(node: fx.Node) -> bool:
    if node.op == "output":
        return True
    if node.op != "call_function" or node.target in _PICKED:
        return False
    if getattr(node.target, "overloadpacket", None) in _CREATED:
        return False
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of an operation."""
    return [
        leaf
        for leaf in pytree.tree_leaves((list(node.args), dict(node.kwargs)))
        if isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("val", leaf), (Tensor, fx.Node))
    ]


def source(node: fx.Node) -> tuple[fx.Node, Items]:
    """The node that computes a tensor, and the selections that lead from its result to the tensor."""
    items: Items = ()
    while node.op == "call_function" and node.target in _PICKED:
        base, *rest = node.args
        if node.target is not torch.ops.aten.slice.Tensor or rest[1:] != [0, sys.maxsize]:
            items = (*items, (node.target, *rest))
        node = base  # type: ignore[assignment]
    return node, items
