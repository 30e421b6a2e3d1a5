"""One iteration of a Python loop over time, as a function of its inputs and the states of the iteration before.

Tracing unrolls such a loop. Traced over one time step and over three, the two lists of operations differ by two
iterations. The values that an iteration takes from the one before it are the loop's state, under any name.
"""

import copy
import operator
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from unroll.export.log_filter import quiet
from unroll.export.signature.outputs import is_same

#: Tensors made of no tensor: the place where they are made says nothing about a loop.
_CREATED = {
    *(getattr(torch.ops.aten, name) for name in ("zeros", "ones", "full", "empty", "arange", "scalar_tensor")),
    *(getattr(torch.ops.aten, f"{name}_like") for name in ("zeros", "ones", "full", "empty")),
    *(getattr(torch.ops.aten, f"new_{name}") for name in ("zeros", "ones", "full", "empty")),
}

#: The tensor itself, if it has the dtype already.
_COPIES = {
    getattr(torch.ops.aten, name) for name in ("to", "_to_copy", "lift_fresh_copy", "detach", "detach_", "alias")
}

#: Parts of a tensor. The part of a single step may be the whole, and is then not picked.
_PICKED = {operator.getitem, torch.ops.aten.select.int, torch.ops.aten.slice.Tensor}

#: What code computes with a number and a tensor.
_ARITHMETIC = {getattr(torch.ops.aten, name) for name in ("add", "sub", "rsub", "mul", "div", "pow", "where")}

#: The origin of a tensor, comparable between iterations.
Origin = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class LoopBody:
    """body: (*arguments of one time step, *states) -> (*results, *states). start: (*arguments) -> (*states).

    finals: for each result, which state it is after the last step, if it is one.
    """

    body: fx.GraphModule
    start: fx.GraphModule
    finals: tuple[int | None, ...]


def traced(module: nn.Module, arguments: list[Tensor], batch_axes: list[int | None]) -> fx.GraphModule:
    """`module` traced over the time steps of `arguments`, for any batch size. Raises the errors of torch.export."""
    batch = Dim("batch", min=1)
    shapes = (tuple({} if axis is None else {axis: batch} for axis in batch_axes),)
    with quiet():
        program = torch.export.export(module, tuple(arguments), dynamic_shapes=shapes, strict=False)
    graph_module = program.module(check_guards=False)
    graph_module.graph.set_codegen(fx.graph.CodeGen())  # takes and returns what its graph does, one by one
    _drop_copies(graph_module)
    return graph_module


def _drop_copies(module: fx.GraphModule) -> None:
    """Casts without effect name a tensor anew, and each iteration makes its constants anew: neither is a step's own."""
    constants: list[tuple[fx.Node, Tensor]] = []
    for node in list(module.graph.nodes):
        same: Any = None
        if node.op == "get_attr" and _is_constant(value := operator.attrgetter(node.target)(module)):
            same = next((one for one, known in constants if known.dtype == value.dtype and is_same(known, value)), None)
            constants.append((node, value))
        elif getattr(node.target, "overloadpacket", None) in _COPIES:
            source, made = node.args[0].meta["val"], node.meta["val"]
            same = node.args[0] if (source.dtype, source.device) == (made.dtype, made.device) else None
        if same is not None:
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)


def _is_constant(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def find_bodies(one: fx.GraphModule, three: fx.GraphModule) -> Iterator[LoopBody]:
    """Every loop body that explains the traces of a module over one and over three time steps, the likeliest first."""
    single, triple = _Trace(one.graph), _Trace(three.graph)
    size, odd = divmod(len(triple.operations) - len(single.operations), 2)
    if odd or size < 1:
        return
    for first in range(len(single.operations) - size + 1):
        if single.names[: first + size] != triple.names[: first + size]:
            return
        loop = triple.names[first : first + size] * 3
        if triple.names[first:] == loop + single.names[first + size :]:
            states = triple.states(first, size)
            if states is not None:
                yield _cut(one, states, first)


def why_no_body(one: fx.GraphModule, three: fx.GraphModule) -> str:
    """What is wrong with a loop that `find_bodies` finds none for, and what to change; empty if that is not known."""
    single, triple = _Trace(one.graph), _Trace(three.graph)
    size, odd = divmod(len(triple.operations) - len(single.operations), 2)
    if odd or size < 1:
        return ""
    names, late = triple.names, False
    for first in range(len(single.operations) + 1):
        step = names[first : first + size]
        if step * 2 == names[first + size : first + 3 * size]:
            return _differing_number(triple.operations[first : first + 3 * size], size)
        late = late or (
            step == names[first + size : first + 2 * size] and names[first + 2 * size :] == single.names[first:]
        )
    if not late:
        return ""
    return (
        "leaves the first time step out of its loop; let the loop run over all steps, from a state before the first "
        "one, as x[:, 0] for a mean that begins with it"
    )


def _differing_number(operations: list[fx.Node], size: int) -> str:
    """A number that an operation is given in each of three time steps, another one in each."""
    for turns in zip(*(operations[turn * size : (turn + 1) * size] for turn in range(3)), strict=True):
        if getattr(turns[0].target, "overloadpacket", None) not in _ARITHMETIC:
            continue
        for numbers in zip(*map(_numbers, turns), strict=False):
            if len(set(numbers)) == len(numbers):
                shown = ", ".join(f"{number:g}" for number in numbers)
                name = str(turns[0].target).removeprefix("aten.").partition(".")[0]
                return (
                    f"computes with another number in each time step ({shown} in {name}); count in a tensor that is "
                    "handed on, as n = zeros(batch, 1) before the loop and n = n + 1 in it, and compute with n"
                )
    return ""


def _numbers(node: fx.Node) -> list[float]:
    leaves = pytree.tree_leaves((list(node.args), dict(node.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, (int, float)) and not isinstance(leaf, bool)]


class _Trace:
    """A traced module as a list of operations on tensors."""

    def __init__(self, graph: fx.Graph) -> None:
        self.operations = [node for node in graph.nodes if _is_operation(node)]
        self.names = [node.target for node in self.operations]
        self._place = {node: index for index, node in enumerate(self.operations)}

    def states(self, first: int, size: int) -> "list[_State] | None":
        """The values that each iteration of `size` operations takes from the one before; None if iterations differ.

        There are three. The first one takes the initial state and begins with operation `first`.
        """
        found: dict[Origin, _State] = {}
        for index in range(size):
            operands = [_operands(self.operations[first + turn * size + index]) for turn in range(3)]
            if len({len(tensors) for tensors in operands}) > 1:
                return None
            for which, nodes in enumerate(zip(*operands, strict=True)):
                begin = self._origin(nodes[0], first, 0)
                later = [self._origin(node, first + turn * size, size) for turn, node in enumerate(nodes) if turn]
                if later[0][:2] != later[1][:2] or (later[0][0] == "this" and begin != later[0]):
                    return None
                if later[0][0] == "last":
                    if later[0] != later[1] or begin[0] == "this":
                        return None
                    found.setdefault(later[0], _State(later[0][1], later[0][2:], [])).uses.append((index, which))
        return list(found.values())

    def _origin(self, node: fx.Node, first: int, size: int) -> Origin:
        """first: where the iteration begins that takes the tensor. size: of the iteration before it."""
        node, items = _source(node)
        place = self._place.get(node)
        if place is None:
            return (node.op, "" if node.op == "call_function" else node.target)
        if place >= first:
            return ("this", place - first, *items)
        if place >= first - size:
            return ("last", place - first + size, *items)
        return ("before", place, *items)


@dataclass(frozen=True, slots=True)
class _State:
    """Made by an iteration's operation `place` (`items`: which of its results), used by the next one at `uses`."""

    place: int
    items: tuple[Any, ...]
    uses: list[tuple[int, int]]


def _is_operation(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target in _PICKED:
        return False
    if getattr(node.target, "overloadpacket", None) in _CREATED:
        return False
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))


def _operands(node: fx.Node) -> list[fx.Node]:
    return [
        leaf
        for leaf in pytree.tree_leaves((list(node.args), dict(node.kwargs)))
        if isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("val", leaf), (Tensor, fx.Node))
    ]


def _source(node: fx.Node) -> tuple[fx.Node, tuple[Any, ...]]:
    """The operation that makes a tensor, and how the tensor is picked from what it makes."""
    items: tuple[Any, ...] = ()
    while node.op == "call_function" and node.target in _PICKED:
        base, *rest = node.args
        if node.target is not torch.ops.aten.slice.Tensor or rest[1:] != [0, sys.maxsize]:
            items = (*items, (node.target, *rest))
        node = base  # type: ignore[assignment]
    return node, items


def _replace(user: fx.Node, which: int, by: fx.Node) -> None:
    operand = _operands(user)
    leaves, structure = pytree.tree_flatten((user.args, user.kwargs))
    places = [place for place, leaf in enumerate(leaves) if any(leaf is one for one in operand)]
    leaves[places[which]] = by
    user.args, user.kwargs = pytree.tree_unflatten(leaves, structure)


def _cut(module: fx.GraphModule, states: list[_State], first: int) -> LoopBody:
    """The module over one time step, with the states as arguments."""
    body, start = copy.deepcopy(module.graph), copy.deepcopy(module.graph)
    operations = _Trace(body).operations
    *_, last = (node for node in body.nodes if node.op == "placeholder")
    output = body.output_node()
    after = []
    for number, state in enumerate(states):
        with body.inserting_after(last):
            last = body.placeholder(f"state_{number}")
        for index, which in state.uses:
            _replace(operations[first + index], which, last)
        node = operations[first + state.place]
        for target, *rest in reversed(state.items):
            with body.inserting_before(output):
                node = body.call_function(target, (node, *rest))
        after.append(node)
    results = list(output.args[0])  # type: ignore[arg-type]
    made = [_source(node) for node in after]
    finals = tuple(made.index(_source(result)) if _source(result) in made else None for result in results)
    output.args = ((*results, *after),)

    begin = [_operands(_Trace(start).operations[first + state.uses[0][0]])[state.uses[0][1]] for state in states]
    start.output_node().args = (tuple(begin),)
    return LoopBody(_plain(module, body), _plain(module, start), finals)


def _plain(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(root, graph)
