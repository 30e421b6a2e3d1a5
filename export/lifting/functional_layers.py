"""Replaces recurrent layers that forward calls as functions, such as `torch._VF.lstm`, by PyTorch's layers.

nn.LSTM, nn.GRU and nn.RNN call these functions themselves.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unroll.export.errors import ExportError
from unroll.export.lifting.dataflow import hooked
from unroll.export.signature.outputs import is_same

#: The layer for each function, and its number of gates.
_LAYERS: dict[Any, tuple[Callable[..., nn.RNNBase], int]] = {
    torch.lstm: (nn.LSTM, 4),
    torch.gru: (nn.GRU, 3),
    torch.rnn_tanh: (nn.RNN, 1),
    torch.rnn_relu: (partial(nn.RNN, nonlinearity="relu"), 1),
}

#: The arguments of these functions.
_ARGUMENTS = ["input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first"]


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of such a function, with its arguments."""

    function: Any
    x: Tensor
    hx: Any
    weights: list[Tensor]
    options: dict[str, Any]

    @classmethod
    def of(cls, function: Any, args: Any, kwargs: Any) -> "_Call | None":
        """Describe a call; None for other functions, and for calls by PyTorch's own layers.

        Raises:
            ExportError: packed_sequence, if the call passes a packed sequence.
        """
        if function not in _LAYERS or sys._getframe(2).f_code.co_filename == nn.GRU.forward.__code__.co_filename:
            return None

        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        if not isinstance(given["has_biases"], bool):
            raise ExportError(
                "packed_sequence",
                f"forward gives the parts of a packed sequence to torch.{function.__name__}; give the PackedSequence "
                "to a recurrent layer, or the padded tensor to the function",
            )
        options = {name: given[name] for name in ("num_layers", "bidirectional", "batch_first")}
        options["bias"] = given["has_biases"]
        return cls(function, given["input"], given["hx"], list(given["params"]), options)

    def layer(self) -> nn.RNNBase:
        """A layer without weights; each call passes its own."""
        make, gates = _LAYERS[self.function]
        (width, inputs), recurrent = self.weights[0].shape, self.weights[1].shape[1]
        proj = {} if recurrent == width // gates else {"proj_size": recurrent}
        return make(inputs, width // gates, device="meta", dtype=self.weights[0].dtype, **self.options, **proj)

    def run(self, layer: nn.RNNBase) -> tuple[Tensor, ...]:
        """Call the layer, and return its results as the function would."""
        if not torch.compiler.is_exporting():
            layer._flat_weights = self.weights  # type: ignore[assignment]
        y, after = layer(self.x, tuple(self.hx) if isinstance(self.hx, (list, tuple)) else self.hx)
        return (y, *after) if isinstance(after, tuple) else (y, after)


def lift_functions(model: nn.Module, runs: list[Callable[[], Any]]) -> None:
    """Make `model` call layers in place of the functions.

    Args:
        runs: call forward, the first with the example, each other one with different values and another length.

    Raises:
        ExportError: not_exportable, for weights that forward computes from its inputs.
    """
    first = _watch(model, runs[0])
    others = [_watch(model, run) for run in runs[1:]] if first else []
    for path, calls in first.items():
        for other in others:
            if len(other.get(path, [])) != len(calls):
                return  # called once per step, in a loop
            for one, same in zip(calls, other[path], strict=True):
                if not all(map(is_same, one.weights, same.weights)):
                    raise ExportError(
                        "not_exportable",
                        f"forward computes the weights that it gives to torch.{one.function.__name__} from its inputs; "
                        "a recurrent layer has the same weights for all sequences",
                    )
    for path, calls in first.items():
        module = model.get_submodule(path)
        module.unroll_functions = nn.ModuleList(call.layer() for call in calls)
        module.__class__ = _calling(type(module))


def _calling(base: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _InLayers(self.unroll_functions):
            return base.forward(self, *args, **kwargs)

    return type(base.__name__, (base,), {"forward": forward})


class _InLayers(TorchFunctionMode):
    """During one call of a module, replaces its function calls by `layers`, in order."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self._left: Iterator[Any] = iter(layers)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _Call.of(func, args, kwargs or {})
        return call.run(next(self._left)) if call else func(*args, **(kwargs or {}))


def _watch(model: nn.Module, run: Callable[[], Any]) -> dict[str, list[_Call]]:
    """The function calls in the last call of each module, by the module's path."""
    found: dict[str, list[_Call]] = {}
    stack: list[list[_Call]] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if stack and (call := _Call.of(func, args, kwargs or {})):
                stack[-1].append(call)
            return func(*args, **(kwargs or {}))

    def leave(path: str) -> Any:
        def hook(*_: Any) -> None:
            if calls := stack.pop():
                found[path] = calls

        return hook

    handles = [module.register_forward_pre_hook(lambda *_: stack.append([])) for module in model.modules()]
    handles += [module.register_forward_hook(leave(path)) for path, module in model.named_modules()]
    with hooked(handles), Watch():
        run()
    return found
