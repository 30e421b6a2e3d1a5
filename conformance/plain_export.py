"""Plain `torch.onnx.export` of a module, called as documented, with dynamic batch and time.

A graph that loads is run at the example's size, another length, another batch size, a single step, and twice in a row,
and is compared with the module. Only differences that rounding cannot explain count.
"""

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

Outcome = Literal["works", "fails", "silently wrong", "cannot be compared"]


@dataclass(frozen=True)
class Verdict:
    """A verdict on one exporter.

    Attributes:
        outcome: `fails` means an error when exporting, loading or running; `cannot be compared` means that the
            module's own answer is not unique.
        says: the error or difference.
        state: whether the graph takes and returns a client's state.
        once: the error of a second export in the same process, if only that fails.
    """

    outcome: Outcome
    says: str = ""
    state: bool = False
    once: str = ""


class _Failed(Exception):
    pass


def judge(build: Callable[[], nn.Module], example: dict[str, Any], batch_first: bool, dynamo: bool) -> Verdict:
    """Export twice, since the second export of a process may differ."""
    first = _judge(build(), example, batch_first, dynamo)
    if first.outcome != "works":
        return first
    second = _judge(build(), example, batch_first, dynamo)
    if second.outcome == "silently wrong":
        return replace(second, says=f"the second export of a process, {second.says}")
    return replace(first, once=second.says)


def _judge(module: nn.Module, example: dict[str, Any], batch_first: bool, dynamo: bool) -> Verdict:
    module = module.eval()
    try:
        if _difference(_answers(module, example), _answers(module, example)):
            return Verdict("cannot be compared", "two calls of the module differ")
    except Exception as error:  # noqa: BLE001 the module may raise anything
        return Verdict("cannot be compared", f"the module cannot be copied or called: {_short(error)}")
    if any(isinstance(value, PackedSequence) for value in example.values()):
        return Verdict("fails", "a PackedSequence has no axes that could be named as dynamic")
    axes = Axes.of(example, batch_first)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain_export.onnx"
        try:
            _export(module, example, axes, path, dynamo)
            graph = _Graph(path)
        except _Failed as failure:
            return Verdict("fails", str(failure))
        state = graph.takes_state(module, example, axes)
        failures: list[str] = []
        wrong: list[str] = []
        for what, batch, time in axes.sizes():
            try:
                wrong += _differs(graph, module, axes.resized(example, batch, time), what)
            except _Failed as failure:
                failures.append(f"{what}: {failure}")
        wrong += _second_call(graph, module, example)
        if state and not wrong and not failures:
            wrong += _stepped(graph, module, example, axes)
        if wrong:
            return Verdict("silently wrong", wrong[0], state)
        return Verdict("fails", failures[0], state) if failures else Verdict("works", state=state)


@dataclass(frozen=True)
class Axes:
    """The batch and time axes of the example's flattened tensors."""

    batch: int
    time: int
    tensors: tuple[dict[int, str], ...]

    @classmethod
    def of(cls, example: dict[str, Any], batch_first: bool) -> "Axes":
        flat = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
        first = next((leaf for leaf in flat if leaf.dim() > 1), flat[0])
        order = (0, 1) if batch_first else (1, 0)
        batch, time = (first.shape[axis] if first.dim() > 1 else 1 for axis in order)
        tensors: list[dict[int, str]] = []
        for leaf in flat:
            if leaf.dim() > 1 and leaf.shape[order[0]] == batch and leaf.shape[order[1]] == time:
                tensors.append({order[0]: "batch", order[1]: "time"})
            elif leaf.dim() == 3 and leaf.shape[1] == batch:  # a state (layers, batch, hidden)
                tensors.append({1: "batch"})
            else:
                tensors.append({0: "batch"} if leaf.dim() and leaf.shape[0] == batch else {})
        return cls(batch, time, tuple(tensors))

    def sizes(self) -> list[tuple[str, int, int]]:
        return [
            ("at the example's own size", self.batch, self.time),
            ("at another length", self.batch, 2 * self.time + 3),
            ("at another batch size", self.batch + 3, self.time),
            ("at a single step", self.batch, 1),
            ("at a batch of one", 1, self.time),
        ]

    def resized(self, example: dict[str, Any], batch: int, time: int) -> dict[str, Any]:
        sizes = {"batch": (self.batch, batch), "time": (self.time, time)}
        places = iter(self.tensors)

        def one(tensor: Tensor) -> Tensor:
            for axis, name in next(places).items():
                before, after = sizes[name]
                if before != after:
                    tensor = tensor.index_select(axis, torch.arange(after) * 5 % before)
            return tensor

        return pytree.tree_map_only(Tensor, one, example)

    def cut(self, example: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
        places = iter(self.tensors)

        def one(tensor: Tensor) -> Tensor:
            for axis, name in next(places).items():
                if name == "time":
                    tensor = tensor.narrow(axis, start, stop - start)
            return tensor

        return pytree.tree_map_only(Tensor, one, example)

    def dynamic(self, example: dict[str, Any]) -> Any:
        places = iter(self.tensors)
        return pytree.tree_map_only(Tensor, lambda _: next(places), example)


def _export(module: nn.Module, example: dict[str, Any], axes: Axes, path: Path, dynamo: bool) -> None:
    module, example = copy.deepcopy(module), copy.deepcopy(example)
    names = [f"input{index}" for index in range(len(axes.tensors))]
    how: dict[str, Any] = {"dynamic_shapes": axes.dynamic(example)}
    if not dynamo:
        how = {"input_names": names, "dynamic_axes": dict(zip(names, axes.tensors, strict=True))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(module, (), str(path), kwargs=example, dynamo=dynamo, verbose=False, **how)
        except Exception as error:
            raise _Failed(f"export: {_short(error)}") from error


class _Graph:
    """Runs a graph with inputs and outputs by position, since the exporter chooses their names."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise _Failed(f"onnxruntime cannot load it: {_short(error)}") from error
        self._names = [node.name for node in self._session.get_inputs()]

    def __call__(self, arguments: dict[str, Any]) -> list[np.ndarray]:
        flat = [leaf.numpy() for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
        if len(flat) != len(self._names):
            raise _Failed(f"the graph has {len(self._names)} inputs, forward {len(flat)}")
        try:
            return self._session.run(None, dict(zip(self._names, flat, strict=True)))
        except Exception as error:
            raise _Failed(_short(error)) from error

    def takes_state(self, module: nn.Module, example: dict[str, Any], axes: Axes) -> bool:
        """Do the last outputs have the shapes of the inputs without a time axis?"""
        flat = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
        states = [tuple(t.shape) for t, places in zip(flat, axes.tensors, strict=True) if "time" not in places.values()]
        outputs = [tuple(tensor.shape) for tensor in _answers(module, example)]
        return bool(states) and outputs[-len(states) :] == states and len(outputs) > len(states)


def _differs(graph: _Graph, module: nn.Module, arguments: dict[str, Any], what: str) -> Iterator[str]:
    """Yield the difference at one size; nothing if PyTorch itself fails there."""
    try:
        expected = _answers(module, arguments)
    except Exception:  # noqa: BLE001 the module may raise anything
        return
    if worst := _difference(graph(arguments), expected):
        yield f"{what}: {worst}"


def _second_call(graph: _Graph, module: nn.Module, example: dict[str, Any]) -> Iterator[str]:
    """Compare a second call, which differs for a module that keeps its state."""
    alive = copy.deepcopy(module)
    with torch.no_grad():
        alive(**example)
    try:
        graph(example)
        worst = _difference(graph(example), _flat(_call(alive, example)))
    except _Failed:
        return
    if worst:
        yield f"at the second chunk, the state being kept in the module: {worst}"


def _stepped(graph: _Graph, module: nn.Module, example: dict[str, Any], axes: Axes) -> Iterator[str]:
    """Compare graph and module step by step, passing the last outputs back as the state."""
    places = [i for i, names in enumerate(axes.tensors) if "time" not in names.values()]
    stepped = []
    for call in (graph, lambda arguments: _answers(module, arguments)):
        flat, structure = pytree.tree_flatten(example)
        steps: list[np.ndarray] = []
        for t in range(axes.time):
            outputs = call(axes.cut(pytree.tree_unflatten(flat, structure), t, t + 1))
            steps.append(outputs[0])
            for place, state in zip(places, outputs[-len(places) :], strict=True):
                flat[place] = torch.from_numpy(state)
        stepped.append(np.stack(steps))
    if worst := _difference(*([steps] for steps in stepped)):
        yield f"stepped with its state: {worst}"


def _answers(module: nn.Module, arguments: dict[str, Any]) -> list[np.ndarray]:
    return _flat(_call(copy.deepcopy(module), arguments))


def _call(module: nn.Module, arguments: dict[str, Any]) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module(**arguments)


def _flat(returned: Any) -> list[np.ndarray]:
    if is_dataclass(returned):
        returned = vars(returned)
    return [leaf.numpy() for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]


def _difference(found: list[np.ndarray], expected: list[np.ndarray]) -> str:
    if len(found) != len(expected):
        return f"{len(found)} outputs instead of {len(expected)}"
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            return f"shape {ours.shape} instead of {theirs.shape}"
        if not np.allclose(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True):
            return f"off by {np.abs(ours.astype(np.float64) - theirs).max():.2g}"
    return ""


def _short(error: BaseException) -> str:
    """Shorten an error to one line; both exporters put the cause at its end."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = re.sub(r"^Found the following conflicts.*?: - ", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {words[:140]}"
