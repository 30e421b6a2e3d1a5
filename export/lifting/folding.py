"""Computes the values of a loop's step that depend only on weights once and in float64, not in each step in float32."""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from unroll.export.lifting.float64 import double_precision
from unroll.export.lifting.scan import Scan

#: The operators that compute nothing.
_VIEWS = {"t", "transpose", "permute", "view", "reshape", "unsqueeze", "squeeze", "select", "slice", "expand", "detach"}


def fold_weights(single: nn.Module, double: nn.Module) -> None:
    """Fold the loops of a lifted model in float32, and those of its copy in float64."""
    for one, exact in zip(single.modules(), double.modules(), strict=True):
        if isinstance(one, Scan) and isinstance(exact, Scan):
            _fold(one.body, exact.body)


def _fold(single: fx.GraphModule, double: fx.GraphModule) -> None:
    values, computed = _constants(double)
    pairs = zip(single.graph.nodes, double.graph.nodes, strict=True)
    ends = [pair for pair in pairs if pair[1] in computed and any(user not in values for user in pair[1].users)]
    for number, nodes in enumerate(ends):
        value = values[nodes[1]]
        for module, node in zip((single, double), nodes, strict=True):
            rounded = value.to(nodes[0].meta["val"].dtype) if module is single else value
            module.register_buffer(f"folded_{number}", rounded.clone(), persistent=False)
            with module.graph.inserting_before(node):
                constant = module.graph.get_attr(f"folded_{number}")
            constant.meta = node.meta
            node.replace_all_uses_with(constant)
    for module in (single, double) if ends else ():
        module.graph.eliminate_dead_code()
        module.recompile()


def _constants(module: fx.GraphModule) -> tuple[dict[fx.Node, Tensor], set[fx.Node]]:
    """Find the tensors that depend only on weights, and those among them that are more than a view of a weight."""
    values: dict[fx.Node, Tensor] = {}
    computed: set[fx.Node] = set()
    for node in module.graph.nodes:
        given, value = node.all_input_nodes, None
        if node.op == "get_attr":
            value = attrgetter(node.target)(module)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and given:
            if node.target._schema.is_mutable and given[0] in values:
                return {}, set()  # a weight changes
            if values.keys() >= set(given) and not node.target._schema.is_mutable:
                value = _called(node, values)
                if node.target.__name__.partition(".")[0] not in _VIEWS or computed & set(given):
                    computed.add(node)
        if isinstance(value, Tensor):
            values[node] = value
    return values, computed & values.keys()


def _called(node: fx.Node, values: dict[fx.Node, Tensor]) -> Any:
    args: Any = fx.map_arg(node.args, values.__getitem__)
    kwargs: Any = fx.map_arg(node.kwargs, values.__getitem__)
    with double_precision(), torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]
