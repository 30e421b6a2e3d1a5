"""Finds modules that loop over time in Python, and lifts them: the loop body is traced, and a scan runs it.

A module that loops does more work for a longer sequence. Comparing answers tells whether its body, scanned forwards or
backwards over the sequence, computes the same as the module.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from unroll.export.errors import COMPLEX, ExportError, attempt, untraceable
from unroll.export.held_objects import undone
from unroll.export.lifting.cell_matching import Recipe, match_cell
from unroll.export.lifting.dataflow import hooked
from unroll.export.lifting.layers import LAYERS
from unroll.export.lifting.loop_body import (
    LoopBody,
    changes_in_place,
    changes_its_inputs,
    find_bodies,
    repeats,
    traced,
    uneven_line,
    why_in_place,
    why_no_body,
    why_selected,
)
from unroll.export.lifting.recording import CannotSplitError
from unroll.export.lifting.replay import Piece, replayed
from unroll.export.lifting.row_loops import ByRow
from unroll.export.lifting.scan import Axes, Scan
from unroll.export.lifting.splitting import BATCHES, TIMES, split
from unroll.export.lifting.state_row import fits_row
from unroll.export.lifting.tape import Call, Part, Tape

#: Runs forward on the example, resized to a batch size and a length.
Resized = Callable[[tuple[int, int]], Any]

#: (batch, time) of the watched calls: the base, another batch size, another length.
_SIZES = ((2, 3), (3, 3), (2, 5))

#: Longer again: a loop does more work again, while one-time work, such as growing a table, does not repeat.
_LONGER = (2, 7)

#: The traces to search for a loop's state: time steps (long ones show states from several steps back), and whether to
#: functionalise in-place changes.
_TRACES = (3, False), (3, True), (5, False), (17, False)

#: (batch, time) of the call that checks a forward after its loops were split off.
_TRIED = (4, 7)

#: (batch, time) of the call that checks a forward that loops over rows: all rows must do the same.
_MANY_ROWS = (67, 2)


@dataclass(slots=True)
class Seen:
    """One call of a module: its flat arguments and results, and the number of operations that it ran itself."""

    given: list[Any]
    structure: Any
    gave: list[Any]
    results: Any = None
    work: int = 0


@dataclass(frozen=True, slots=True)
class Loop:
    """The signature of a lifted module: the structures of arguments and results, and the results of the base call."""

    path: str
    structure: Any
    gave: list[Any]
    results: Any

    def __deepcopy__(self, memo: Any) -> "Loop":
        return self  # immutable, and copying a pytree structure warns


def lift_loops(model: nn.Module, tape: Tape, run: Resized) -> None:
    """Lift every module that loops over time, in place. Raises ExportError(calls_depend_on_time) for one it cannot."""
    try:
        base, wide, long = (_watch(model, partial(run, size)) for size in _SIZES)
        loops = [path for path in base if _work(base[path]) != _work(long.get(path, []))]
        longer = _watch(model, partial(run, _LONGER)) if loops else {}
    except ExportError:
        return  # forward fails for some size: a later check has a clearer message
    loops = [path for path in loops if _work(longer.get(path, [])) != _work(long.get(path, []))]
    for path in loops:
        if any(path != other and (not other or path.startswith(other + ".")) for other in loops):
            continue
        if any(_is_lifted(model.get_submodule(caller)) for caller in _callers(path)):
            continue
        try:
            _lift_at(model, path, tape, run, base, wide, long)
        except ExportError:
            if not any(_lift_caller(model, caller, tape, base, wide, long) for caller in _callers(path)):
                raise


def _lift_at(model: nn.Module, path: str, tape: Tape, run: Resized, *seen: dict[str, list[Seen]]) -> None:
    """Lift the module at `path`, or its loops one by one."""
    name, calls = path or type(model).__name__, [each[path] for each in seen]
    if len({len(each) for each in calls}) > 1:
        raise _refusal(name, "the number of its calls depends on the length")
    first = [each[0] for each in calls]
    by_row = first[0].work != first[1].work
    try:
        many = _watch(model, partial(run, _MANY_ROWS))[path] if by_row else ()
        _lift(model.get_submodule(path), name, tape, *first, *many)
    except ExportError as error:
        try:
            _split(model, path, name, tape, run)
        except (CannotSplitError, ExportError, RuntimeError):  # user code, or a module within torch.vmap
            raise (_row_loop(name, error) if by_row else error) from None


def _callers(path: str) -> Iterator[str]:
    """The paths of the modules around the one at `path`, from the inside out."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _lift_caller(model: nn.Module, path: str, tape: Tape, *seen: dict[str, list[Seen]]) -> bool:
    """Lift a module together with a loop that it calls, and may set up or use in part. Returns whether it is lifted."""
    module, calls = model.get_submodule(path), [each.get(path, []) for each in seen]
    if any(len(each) != 1 for each in calls) or any(map(_is_lifted, module.modules())):
        return False
    with suppress(ExportError):
        _lift(module, path or type(model).__name__, tape, *(each[0] for each in calls))
    return _is_lifted(module)


def _is_lifted(module: nn.Module) -> bool:
    return hasattr(module, "unroll_scan")


def _work(calls: list[Seen]) -> list[int]:
    return [seen.work for seen in calls]


def _watch(model: nn.Module, run: Callable[[], Any]) -> dict[str, list[Seen]]:
    """The calls of every module by path, in order of their start, except those of PyTorch's recurrent layers."""
    found: dict[str, list[Seen]] = {}
    stack: list[Seen] = []

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            count()
            stack.append(Seen(*pytree.tree_flatten((args, kwargs)), []))
            found.setdefault(path, []).append(stack[-1])

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen = stack.pop()
        seen.gave, seen.results = pytree.tree_flatten(output)

    def count() -> None:
        if stack:
            stack[-1].work += 1

    class Count(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            count()
            return func(*args, **(kwargs or {}))

    watched = [(path, module) for path, module in model.named_modules() if not isinstance(module, LAYERS)]
    handles = [module.register_forward_pre_hook(before(path), with_kwargs=True) for path, module in watched]
    handles += [module.register_forward_hook(after) for _, module in watched]
    with hooked(handles), Count():
        run()
    return found


def _lift(module: nn.Module, name: str, tape: Tape, base: Seen, wide: Seen, long: Seen, *many: Seen) -> None:
    """many: a call with many rows, of a module that loops over them."""
    for one in (wide, long):
        if (one.structure, one.results) != (base.structure, base.results):
            raise _refusal(name, "its arguments or results depend on the length or the batch size")
    inputs, outputs = _axes(name, base.given, wide.given, long.given), _axes(name, base.gave, wide.gave, long.gave)
    if not any(axes.time is not None and axes.batch is not None for axes in inputs):
        raise _refusal(name, "none of its arguments has the batch and the time of the input")
    flat: nn.Module = _Flat(module, base.given, base.structure)
    flat = ByRow(flat, [axes.batch for axes in inputs], [axes.batch for axes in outputs]) if many else flat
    scan = _find(flat, name, inputs, outputs, [wide, long, *many])
    module.unroll_by_row = bool(many)  # type: ignore[assignment]
    module.__class__ = type(type(module).__name__, (type(module),), {"forward": _forward})
    module.unroll_loop = Loop(name, base.structure, base.gave, base.results)  # type: ignore[assignment]
    module.unroll_scan, module.unroll_tape = scan, tape  # type: ignore[assignment]
    recipe = match_cell(scan)
    module.unroll_layer = recipe.layer(scan.body) if recipe else None  # type: ignore[assignment]
    module.unroll_recipe = recipe  # type: ignore[assignment]


def _split(model: nn.Module, path: str, name: str, tape: Tape, run: Resized) -> None:
    """Make the module at `path` call a separate module for each of its loops."""
    module = model.get_submodule(path)
    sizes = [(batch, time) for batch in BATCHES for time in TIMES]
    seen = {size: _watch(model, partial(run, size))[path] for size in (*sizes, _TRIED)}
    if any(len(calls) != 1 for calls in seen.values()):
        raise CannotSplitError("it is called more than once")
    found = split(module, {size: (seen[size][0].given, seen[size][0].structure) for size in sizes}, _batch_and_time)
    for number, (piece, values) in enumerate(zip(found.pieces, found.values, strict=True)):
        calls = [Seen(*pytree.tree_flatten((tuple(values[size][0]), {})), *_flat(values[size][1])) for size in _SIZES]
        _lift(piece, name if len(found.pieces) == 1 else f"{name} loop {number + 1}", tape, *calls)
    base = seen[_SIZES[0]][0]
    place = _batch_and_time(*(seen[size][0].given for size in _SIZES))
    before = module.__class__
    module.unroll_split, module.unroll_loops = found, nn.ModuleList(found.pieces)  # type: ignore[assignment]
    module.__class__ = type(
        before.__name__, (before,), {"forward": replayed(found.program, base.structure, base.results, *place)}
    )
    tried = seen[_TRIED][0]
    args, kwargs = pytree.tree_unflatten(tried.given, tried.structure)
    tape.start(None, None)
    again = pytree.tree_leaves(attempt("the example", lambda: module(*args, **kwargs)))
    tape.start(None, None)
    if not all(map(_close, _tensors(again), _tensors(tried.gave))):
        module.__class__ = before
        raise CannotSplitError("its answers change")


def _flat(results: list[Tensor]) -> tuple[list[Any], Any]:
    return pytree.tree_flatten(tuple(results))


def _batch_and_time(base: list[Any], wide: list[Any], long: list[Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The (argument, axis) of batch and of time, in the first argument that has both."""
    for index, tensors in enumerate(zip(base, wide, long, strict=True)):
        axes = Axes.of(*tensors) if all(isinstance(tensor, Tensor) for tensor in tensors) else None
        if axes and axes.batch is not None and axes.time is not None:
            return (index, axes.batch), (index, axes.time)
    raise CannotSplitError("none of its arguments has the batch and the time of the input")


def _axes(name: str, base: list[Any], wide: list[Any], long: list[Any]) -> list[Axes]:
    found = []
    for leaves in zip(base, wide, long, strict=True):
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            if any(isinstance(leaf, Tensor) or leaf != leaves[0] for leaf in leaves):
                raise _refusal(name, "a number in its arguments or results depends on the length or the batch size")
            continue
        axes = Axes.of(*leaves)
        if axes is None or (axes.time is not None and leaves[0].shape[axes.time] != _SIZES[0][1]):
            raise _refusal(name, "the length of a tensor in its arguments or results differs from the input's")
        found.append(axes)
    return found


class _Flat(nn.Module):
    """Adapts a module to flat tensor arguments and results."""

    def __init__(self, module: nn.Module, given: list[Any], structure: Any) -> None:
        super().__init__()
        self.module = module
        self._given, self._structure = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in given], structure

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        leaves = [next(left) if leaf is Tensor else leaf for leaf in self._given]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        return tuple(_tensors(pytree.tree_leaves(self.module(*args, **kwargs))))


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _find(flat: nn.Module, name: str, inputs: list[Axes], outputs: list[Axes], calls: list[Seen]) -> Scan:
    """Find a scan that gives the module's answers. Raises ExportError(calls_depend_on_time) if there is none."""
    whole = _tensors(calls[0].given)
    first = [t if a.time is None else t.narrow(a.time, 0, 1) for t, a in zip(whole, inputs, strict=True)]
    why, ones, unlike = "", dict[bool, fx.GraphModule](), set[bool]()
    for turns, functional in _TRACES:
        if isinstance(flat.module, Piece) and turns not in TIMES:
            continue
        # Tracing is slow: skip modes with steps that are known to differ.
        if functional in unlike or (functional and not changes_in_place(ones[False])):
            continue
        longer = _longer(whole, inputs, turns)
        if functional not in ones:
            ones[functional] = _traced(flat, name, first, inputs, functional)
        one, more = ones[functional], _traced(flat, name, longer, inputs, functional)
        if not repeats(one, more, turns):
            unlike.add(functional)
        for step in find_bodies(one, more, turns):
            if changes_its_inputs(step.body):
                continue
            states = _states(step, name, first, inputs)
            if states is None:
                continue
            for backwards in (False, True):
                scan = Scan(step, inputs, outputs, states, backwards)
                if all(_is_same(scan, seen) for seen in calls):
                    return scan
        if (turns, functional) == _TRACES[0]:
            why = why_selected(one) or why_no_body(one, more) or why_in_place(one)
    if why:
        raise ExportError("calls_depend_on_time", f"{name!r} {why}")
    counted = [_traced(flat, name, _longer(whole, inputs, turns), inputs, False) for turns in (1, 3, 5)]
    if line := uneven_line(*counted):
        raise ExportError(
            "calls_depend_on_time",
            f"{name!r} loops over time steps, and not every step runs the same operations{line}; make every step do "
            "the same: where steps differ by their number, count in a tensor, as n = n + 1, and select with "
            "torch.where(n % 4 == 0, new, old); start a list of earlier steps full, as deque([zeros] * 3, maxlen=3)",
        )
    raise ExportError(
        "calls_depend_on_time",
        f"{name!r} loops over time steps, and its answers are not those of one step that all of them repeat, the first "
        "and the last included; make each step compute its answer from its own time step and from states that start as "
        "float32, int64, int32 or bool tensors, and move anything else into a module around the loop",
    )


def _longer(tensors: list[Tensor], inputs: list[Axes], turns: int) -> list[Tensor]:
    """Tensors of so many time steps, repeated from those given."""
    return [
        t if a.time is None else t.index_select(a.time, torch.arange(turns) % t.shape[a.time])
        for t, a in zip(tensors, inputs, strict=True)
    ]


def _traced(flat: nn.Module, name: str, tensors: list[Tensor], inputs: list[Axes], functional: bool) -> fx.GraphModule:
    try:
        with undone(flat):
            return traced(flat, tensors, [axes.batch for axes in inputs], functional=functional)
    except Exception as error:
        raise untraceable(repr(name), error) from error


def _states(step: LoopBody, name: str, first: list[Tensor], inputs: list[Axes]) -> list[Axes] | None:
    """The axes of the states, from two batch sizes; None if the states differ in more than the batch."""
    fewer = [t if a.batch is None else t.narrow(a.batch, 0, 2) for t, a in zip(first, inputs, strict=True)]
    try:
        after = [step.body(*tensors, *step.start(*tensors))[len(step.finals) :] for tensors in (fewer, first)]
    except IndexError:  # the step reads another time step than its own
        return None
    for dtype in {tensor.dtype for tensor in after[0] if not fits_row(tensor.dtype)}:
        change = COMPLEX if dtype.is_complex else "keep it as a float, an int64 or a bool, as with n.long()"
        raise ExportError("dtype", f"the loop of {name!r} carries {dtype}; {change}")
    axes = [Axes.of(two, three, two) for two, three in zip(*after, strict=True)]
    return None if None in axes else [_with_batch(each) for each in axes if each]


def _with_batch(axes: Axes) -> Axes:
    """Give every row its own copy of a shared state, such as a count of steps: rows may be at different positions."""
    return axes if axes.batch is not None else replace(axes, batch=0, shape=(2, *(axes.shape or (1,))))


def _is_same(scan: Scan, seen: Seen) -> bool:
    given = _tensors(seen.given)
    try:
        results, _ = scan(given, scan.initial(given), None)
    except RuntimeError:
        return False  # the body may not accept a shared state with a row per client
    return all(map(_close, results, _tensors(seen.gave)))


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a lifted module."""
    loop: Loop = module.unroll_loop  # type: ignore[assignment]
    scan: Scan = module.unroll_scan  # type: ignore[assignment]
    tape: Tape = module.unroll_tape  # type: ignore[assignment]
    leaves, structure = pytree.tree_flatten((args, kwargs))
    if structure != loop.structure:
        raise _refusal(loop.path, "it is called in different ways")
    given = _tensors(leaves)
    if hasattr(module.unroll_layer, "unroll_tape"):  # lifted, too
        results = _by_layer(module, scan, given)
    elif not scan.states:
        results, _ = scan(given, [], tape.lens)
    else:
        index, start = tape.begin(loop.path, lambda: scan.initial(given))
        results, final = scan(given, start, tape.lens)
        direction: Literal["forward", "reverse"] = "reverse" if scan.backwards else "forward"
        parts = tuple(Part("carry", number, direction) for number in range(len(final)))
        asked = tuple(t for t, axes in zip(given, scan.inputs, strict=True) if axes.time is None)
        returned = tuple(result for result, number in zip(results, scan.finals, strict=True) if number is not None)
        batch, time = scan.size(given)
        tape.calls.append(Call(loop.path, index, parts, batch, time, start, final, asked, returned))
    left = iter(results)
    gave = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in loop.gave]
    return pytree.tree_unflatten(gave, loop.results)


def _by_layer(module: nn.Module, scan: Scan, given: list[Tensor]) -> list[Tensor]:
    """Compute the scan's results with the PyTorch layer that matches its body."""
    recipe: Recipe = module.unroll_recipe  # type: ignore[assignment]
    tape: Tape = module.unroll_tape  # type: ignore[assignment]
    x, axes = next((t, axes) for t, axes in zip(given, scan.inputs, strict=True) if axes.time is not None)
    states = [state.unsqueeze(0).contiguous() for state in scan.initial(given)]
    in_order = tuple(states[::-1] if recipe.swapped else states)
    y, after = module.unroll_layer(  # type: ignore[operator]
        x.movedim((axes.batch or 0, axes.time or 0), (0, 1)), in_order if len(states) == 2 else in_order[0]
    )
    reached = [state.squeeze(0) for state in (after if isinstance(after, tuple) else (after,))]
    reached = reached[::-1] if recipe.swapped else reached
    tape.calls[-1] = replace(tape.calls[-1], returned=tuple(reached))
    return [
        reached[final] if final is not None else y.movedim((0, 1), (axes.batch or 0, axes.time or 0))
        for axes, final in zip(scan.outputs, scan.finals, strict=True)
    ]


def refill(model: nn.Module) -> None:
    """Copy the weights of loop bodies to the layers that replace them."""
    for module in model.modules():
        if isinstance(layer := getattr(module, "unroll_layer", None), nn.RNNBase):
            module.unroll_recipe.fill(layer, module.unroll_scan.body)  # type: ignore[operator, union-attr]


def _row_loop(name: str, error: ExportError) -> ExportError:
    return ExportError(
        "calls_depend_on_time",
        f"{name!r} loops over the rows of a batch, and cannot run for all rows at once ({error}); make it compute with "
        "whole batches, as with x[:, t] in place of x[row, t]",
    )


def _refusal(name: str, why: str) -> ExportError:
    return ExportError(
        "calls_depend_on_time",
        f"{name!r} loops over time steps, and {why}; move the loop into a separate module with nothing else in it, or "
        "call a recurrent layer once on the whole sequence",
    )
