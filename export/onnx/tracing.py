"""Traces the lifted model with dynamic batch and time, and lists the sizes at which the trace may be wrong."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.sym_node import SymNode

from unroll.export.errors import ExportError
from unroll.export.lifting.streaming import StreamingModule
from unroll.export.source_lines import current_line, traced_line

#: (batch, time) pairs to compare with PyTorch.
Suspects = list[tuple[int, int]]

#: Sizes up to this one that break a guard are tried one by one. A guard that larger sizes break is a refusal.
_LARGEST_SUSPECT = 8

#: The sizes to evaluate a guard with.
_SIZES = (*range(1, 4097), *(2**power for power in range(13, 32)))

_GUARD = re.compile(
    r"Not all values of (batch|time) = (.+?) in the specified range satisfy the generated guard (.+?)\.?$"
)

_FIXED = re.compile(r"You marked (batch|time) as dynamic but your code specialized it")

#: Divisions that ONNX writes as `Div` or `Mod`.
_DIVISIONS = {"div", "floor_divide", "floordiv", "fmod", "mod", "remainder"}


def trace(module: StreamingModule, arguments: tuple[Any, ...]) -> tuple[ExportedProgram, Suspects]:
    """Trace `module`.

    By default, the exporter turns a branch on a size into a runtime check and then drops the check, so the graph is
    wrong for sizes that fail it. PyTorch itself adds such guards for sizes 0 and 1. If only a few small sizes break a
    guard, they become suspects.

    Args:
        module: the lifted model.
        arguments: state, sequence_lens and the inputs of `module`.

    Raises:
        ExportError: not_exportable.
    """
    # Both refuse symbolic sizes.
    unflatten = mock.patch.object(nn.Unflatten, "_require_tuple_int")
    with unflatten, mock.patch.object(torch, "max_pool1d", _max_pool1d):
        return _trace(module, arguments)


def _max_pool1d(
    input: Tensor, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    size, step, pad, apart = (
        (value,) if isinstance(value, int) else tuple(value)
        for value in (kernel_size, stride or kernel_size, padding, dilation)
    )
    options = (1, *size), (1, *step), (0, *pad), (1, *apart), ceil_mode
    return torch.max_pool2d(input.unsqueeze(-2), *options).squeeze(-2)


def _trace(module: StreamingModule, arguments: tuple[Any, ...]) -> tuple[ExportedProgram, Suspects]:
    batch, time = Dim("batch", min=1), Dim("time", min=1)
    shapes = ({0: batch}, {0: batch}, tuple({0: batch, 1: time} for _ in arguments[2:]))
    try:
        with _noted_numbers() as numbers:
            return torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False), []
    except torch._dynamo.exc.UserError as error:
        if "Constraints violated" not in str(error):
            raise
        suspects = _suspects(str(error), numbers)
    traced = torch.export.export(
        module, arguments, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
    )
    return traced, suspects


@contextmanager
def _noted_numbers() -> Iterator[list[str]]:
    """Within, notes the lines of the user's code at which a size of the example becomes a plain number."""
    lines: list[str] = []
    number = SymNode.guard_int

    def noted(node: Any, *where: Any) -> int:
        if node.maybe_as_int() is None:
            lines.append(current_line())
        return number(node, *where)

    with mock.patch.object(SymNode, "guard_int", noted):
        yield lines


def _suspects(message: str, numbers: Iterable[str] = ()) -> Suspects:
    found: Suspects = []
    for line in message.splitlines():
        if line.startswith("The error above occurred"):
            break
        if not line.startswith("  - "):
            continue
        if fixed := _FIXED.search(line):
            size, where = "batch size" if fixed[1] == "batch" else "length", next(filter(None, numbers), "")
            raise ExportError(
                "not_exportable",
                f"forward converts the {size} to a plain number, as with len(x), int() or math.sqrt(){where}, which "
                "fixes it; compute with x.shape[1] itself, as in x.shape[1] ** 0.5",
            )
        guard = _GUARD.search(line)
        broken = _broken(guard[2], guard[3]) if guard else None
        if guard is None or broken is None or (broken and max(broken) > _LARGEST_SUSPECT):
            what = guard[3].replace(guard[2], guard[1]) if guard else line.removeprefix("  - ")
            what = what.replace(f" and {guard[1]} <= IntInfinity()", "") if guard else what
            raise ExportError(
                "not_exportable",
                "forward does not treat every length and batch size alike (a branch on a size, or a table of fixed "
                f"length); the trace holds only for {what}",
            )
        found += [(size, 7) if guard[1] == "batch" else (3, size) for size in broken]
    return found


def _broken(symbol: str, guard: str) -> list[int] | None:
    """The sizes that break a guard such as `(-1) + L['x'].size()[1] != 1`; None if it cannot be parsed."""
    expression = guard.replace(symbol, "size")
    if not re.fullmatch(r"(?:size\b|and\b|or\b|[Mm]in\b|[Mm]ax\b|[\s\d()+\-*/%<>=!,])+", expression):
        return None
    names = {"__builtins__": {}, "min": min, "max": max, "Min": min, "Max": max}
    try:
        return [n for n in _SIZES if not eval(expression, names, {"size": n})]  # noqa: S307 made by torch, no names
    except (SyntaxError, TypeError, ArithmeticError):
        return None


def first_node(program: ExportedProgram | None, is_meant: Callable[[fx.Node], bool]) -> fx.Node | None:
    modules = program.graph_module.modules() if program else ()
    graphs = [module.graph for module in modules if isinstance(module, fx.GraphModule)]
    return next((node for graph in graphs for node in graph.nodes if is_meant(node)), None)


def place_of(program: ExportedProgram | None, is_meant: Callable[[fx.Node], bool]) -> str:
    """The line of the user's code that the first such node comes from, and its module: ` (at net.py:14) in 'cell'`."""
    node = first_node(program, is_meant)
    if node is None:
        return ""
    paths = [path for path, *_ in node.meta.get("nn_module_stack", {}).values()]
    path = paths[-1].removeprefix("model").removeprefix(".") if paths else ""
    return traced_line(node.meta.get("stack_trace") or "") + (f" in {path!r}" if path else "")
