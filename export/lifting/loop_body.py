"""One iteration of a Python loop over time, as a function of its inputs and the previous iteration's states.

Tracing unrolls such a loop. Traces over one time step and over three differ by two iterations. The values that an
iteration takes from the previous one are the loop's state, whatever their names.
"""

import copy
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from unroll.export.lifting.loop_states import Iterations, State, Trace, find_states, operands, source
from unroll.export.log_filter import quiet
from unroll.export.signature.outputs import is_same
from unroll.export.source_lines import traced_line

#: Copies and casts; without effect if the tensor already has the dtype.
_COPIES = {
    getattr(torch.ops.aten, name) for name in ("to", "_to_copy", "lift_fresh_copy", "detach", "detach_", "alias")
}

#: Arithmetic that may combine a number and a tensor.
_ARITHMETIC = {getattr(torch.ops.aten, name) for name in ("add", "sub", "rsub", "mul", "div", "pow", "where")}


@dataclass(frozen=True, slots=True)
class LoopBody:
    """One iteration of a loop.

    Attributes:
        body: (*arguments of one time step, *states) -> (*results, *states).
        start: (*arguments) -> (*initial states).
        finals: for each result, the index of the state that it equals after the last step; None if there is none.
        delay: how many iterations back the oldest value that an iteration reads was computed.
    """

    body: fx.GraphModule
    start: fx.GraphModule
    finals: tuple[int | None, ...]
    delay: int


def traced(
    module: nn.Module, arguments: list[Tensor], batch_axes: list[int | None], *, functional: bool = False
) -> fx.GraphModule:
    """Trace `module` over the time steps of `arguments`, for any batch size. Raises the errors of torch.export.

    Args:
        module: the module to trace.
        arguments: its tensors.
        batch_axes: the batch axis of each argument, if it has one.
        functional: replace in-place operations by operations that make new tensors.
    """
    batch = Dim("batch", min=1)
    shapes = (tuple({} if axis is None else {axis: batch} for axis in batch_axes),)
    with quiet():
        program = torch.export.export(module, tuple(arguments), dynamic_shapes=shapes, strict=False)
        program = program.run_decompositions({}) if functional else program
        graph_module: fx.GraphModule = program.module(check_guards=False)
        if any(getattr(node.target, "__name__", "") == "_add_batch_dim" for node in graph_module.graph.nodes):
            graph_module = _unmapped(module, arguments, batch_axes)
    graph_module.graph.set_codegen(fx.graph.CodeGen())  # flat arguments and results, as in the graph
    _drop_copies(graph_module)
    if functional:
        _sink_views(graph_module.graph)
    return graph_module


def _unmapped(module: nn.Module, arguments: list[Tensor], batch_axes: list[int | None]) -> fx.GraphModule:
    """Trace `module` down to the operators that torch.vmap calls: torch.export keeps torch.vmap itself."""
    fake, given = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), []
    for tensor, batch in zip(arguments, batch_axes, strict=True):
        sizes = [DimDynamic.DYNAMIC if axis == batch else DimDynamic.STATIC for axis in range(tensor.dim())]
        given.append(fake.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)))
    return make_fx(module, _allow_non_fake_inputs=True)(*given)


def _sink_views(graph: fx.Graph) -> None:
    """Move each view right before its first user, since functionalisation re-creates views after in-place changes."""
    for node in reversed(list(graph.nodes)):
        if node.target is torch.ops.aten.view.default and node.users:
            min(node.users).prepend(node)


def _drop_copies(module: fx.GraphModule) -> None:
    """Remove casts without effect, and constants that an iteration duplicates: both would make iterations differ."""
    constants: list[tuple[fx.Node, Tensor]] = []
    for node in list(module.graph.nodes):
        same: Any = None
        if node.op == "get_attr" and _is_constant(value := operator.attrgetter(node.target)(module)):
            same = next((one for one, known in constants if known.dtype == value.dtype and is_same(known, value)), None)
            constants.append((node, value))
        elif getattr(node.target, "overloadpacket", None) in _COPIES:
            given, made = node.args[0].meta["val"], node.meta["val"]
            same = node.args[0] if (given.dtype, given.device) == (made.dtype, made.device) else None
        if same is not None:
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)


def _is_constant(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def find_bodies(one: fx.GraphModule, more: fx.GraphModule, turns: int) -> Iterator[LoopBody]:
    """Yield the loop bodies that explain the traces over one and over several time steps, most likely first.

    Args:
        one, more: the traces.
        turns: the number of time steps of `more`.
    """
    single, long = Trace(one.graph), Trace(more.graph)
    for first, size in _steps(single.names, long.names, turns):
        states = find_states(single, long, Iterations(first, size, turns))
        if states or (size and states is not None):
            yield _cut(one, more, states, first)


def repeats(one: fx.GraphModule, more: fx.GraphModule, turns: int) -> bool:
    """Does the longer trace repeat the same calls for each time step?"""
    return any(_steps(Trace(one.graph).names, Trace(more.graph).names, turns))


def _steps(single: list[Any], long: list[Any], turns: int) -> Iterator[tuple[int, int]]:
    """Yield possible starts of the first iteration, with the number of operations per iteration."""
    size, odd = divmod(len(long) - len(single), turns - 1)
    for first in range(len(single) - size + 1) if not odd and size >= 0 else ():
        if single[: first + size] != long[: first + size]:
            return
        if long[first:] == long[first : first + size] * turns + single[first + size :]:
            yield first, size


def why_no_body(one: fx.GraphModule, three: fx.GraphModule) -> str:
    """Explain why `find_bodies` found no body, and what to change; empty if the reason is unknown."""
    single, triple = Trace(one.graph), Trace(three.graph)
    size, odd = divmod(len(triple.operations) - len(single.operations), 2)
    if odd or size < 1:
        return ""
    names, late = triple.names, False
    for first in range(len(single.operations) + 1):
        step = names[first : first + size]
        if step * 2 == names[first + size : first + 3 * size]:
            operations = triple.operations[first : first + 3 * size]
            return _differing_number(operations, size) or _number_first(operations, size)
        late = late or (
            step == names[first + size : first + 2 * size] and names[first + 2 * size :] == single.names[first:]
        )
    if not late:
        return ""
    return (
        "leaves the first time step out of its loop; loop over all steps, starting from a state before the first one: "
        "zeros instead of None, or x[:, 0] for a mean that starts with it"
    )


def uneven_line(*traces: fx.GraphModule) -> str:
    """The line of the user's code that runs more operations in some steps; empty if there is none.

    Args:
        traces: over one, three and five time steps.
    """
    one, three, five = (
        Counter(traced_line(node.meta.get("stack_trace") or "") for node in trace.graph.nodes) for trace in traces
    )
    return next((line for line in five if line and five[line] - three[line] != three[line] - one[line]), "")


def changes_in_place(one: fx.GraphModule) -> bool:
    return any(_is_mutable(node) for node in one.graph.nodes)


def changes_its_inputs(body: fx.GraphModule) -> bool:
    """Does the body of a loop modify a state in place? A Scan cannot."""
    return any(_is_mutable(node) and node.args[0].op == "placeholder" for node in body.graph.nodes)


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def why_in_place(one: fx.GraphModule) -> str:
    """Explain what to change in a loop that assigns to a tensor in place; empty if it does not."""
    if all(node.target is not torch.ops.aten.copy_.default for node in one.graph.nodes):
        return ""
    return (
        "carries a state that cannot be identified, and modifies tensors in place, as in state[k] = part; build a new "
        "state in each step, as with parts.append(part) and then state = torch.stack(parts)"
    )


def why_selected(one: fx.GraphModule) -> str:
    """Explain what to change in a loop that selects its time step with a tensor; empty if it does not."""
    for node in one.graph.nodes:
        if node.target is torch.ops.aten.index_select.default and node.args[2].op == "get_attr":
            line = traced_line(node.meta.get("stack_trace") or "")
            return f"selects its time step with a tensor{line}; select it with a number, as x[:, t]"
    return ""


def _differing_number(operations: list[fx.Node], size: int) -> str:
    """Explain that an operation uses a different number in each of three time steps; empty if none does."""
    for turns in zip(*(operations[turn * size : (turn + 1) * size] for turn in range(3)), strict=True):
        if getattr(turns[0].target, "overloadpacket", None) not in _ARITHMETIC:
            continue
        for numbers in zip(*map(_numbers, turns), strict=False):
            if len(set(numbers)) == len(numbers):
                shown = ", ".join(f"{number:g}" for number in numbers)
                name = str(turns[0].target).removeprefix("aten.").partition(".")[0]
                return (
                    f"uses a different number in each time step ({shown} in {name}); count in a tensor that the loop "
                    "carries, with n = zeros(batch, 1) before the loop and n = n + 1 in it, and compute with n"
                )
    return ""


def _number_first(operations: list[fx.Node], size: int) -> str:
    """Explain that the first step computes with a number where the next has a state; empty if it does not."""
    for one, two in zip(operations[:size], operations[size : 2 * size], strict=True):
        if len(operands(one)) < len(operands(two)) and len(_numbers(one)) > len(_numbers(two)):
            sizes = ", ".join(map(str, two.meta["val"].shape[1:]))
            return f"starts a state from a number; start it from a tensor, as x.new_zeros(x.shape[0], {sizes})"
    return ""


def _numbers(node: fx.Node) -> list[float]:
    leaves = pytree.tree_leaves((list(node.args), dict(node.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, (int, float)) and not isinstance(leaf, bool)]


def _replace(user: fx.Node, which: int, by: fx.Node) -> None:
    operand = operands(user)
    leaves, structure = pytree.tree_flatten((user.args, user.kwargs))
    places = [place for place, leaf in enumerate(leaves) if any(leaf is one for one in operand)]
    leaves[places[which]] = by
    user.args, user.kwargs = pytree.tree_unflatten(leaves, structure)


def _cut(one: fx.GraphModule, more: fx.GraphModule, states: list[State], first: int) -> LoopBody:
    """Cut the loop body out of the trace over one time step, with the states as arguments."""
    body = copy.deepcopy(one.graph)
    trace = Trace(body)
    *_, last = (node for node in body.nodes if node.op == "placeholder")
    output, given = body.output_node(), []
    for number, state in enumerate(states):
        with body.inserting_after(last):
            last = body.placeholder(f"state_{number}")
        given.append(last)
        for index, which in state.uses:
            _replace(trace.operations[first + index], which, last)
    after = []
    for state in states:
        node = trace.find(state.base, first) if state.before is None else given[state.before]
        for target, *rest in reversed(state.items if state.before is None else ()):
            with body.inserting_before(output):
                node = body.call_function(target, (node, *rest))
        after.append(node)
    results = list(output.args[0])  # type: ignore[arg-type]
    made = [source(node) for node in after]
    finals = tuple(made.index(source(result)) if source(result) in made else None for result in results)
    output.args = ((*results, *after),)
    delay = max((state.age for state in states), default=0)
    return LoopBody(_plain(one, body), _start(one, more, states, first), finals, delay)


def _start(one: fx.GraphModule, more: fx.GraphModule, states: list[State], first: int) -> fx.GraphModule:
    """The graph of the initial states. A state that only later steps read exists in the longer trace only."""
    module, begins = more, [state.begin for state in states]
    if all(state.uses for state in states):
        module, operations = one, Trace(one.graph).operations[first:]
        begins = [operands(operations[index])[which] for index, which in (state.uses[0] for state in states)]
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.graph_copy(module.graph, copies)
    graph.output(tuple(copies[node] for node in begins))
    return _plain(module, graph)


def _plain(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(root, graph)
