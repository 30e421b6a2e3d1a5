"""The lifted model as one function of (state row, lengths, inputs): what ONNX gets, and what the probes run."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bundle.golden import Arrays, RunFunction
from export.double import double_precision
from export.errors import ExportError, first_line
from export.inputs import StateArgument
from export.lift import Call, Layout, Tape
from export.outputs import Output, leaves
from export.samples import as_tensors


class StreamingModule(nn.Module):
    """`forward(state, sequence_lens, *inputs) -> (*outputs, state_out)`, batch first throughout.

    state: (batch, state_size); sequence_lens: (batch,) int32, or None to run PyTorch's own layers instead of the
    custom op; inputs: (batch, time, ...). `layout` and `outputs` are filled in once they are known.
    """

    def __init__(
        self, model: nn.Module, tape: Tape, names: list[str], constants: dict[str, StateArgument], batch_first: bool
    ) -> None:
        super().__init__()
        self.model, self.tape, self.names, self.constants = model, tape, names, constants
        self.batch_first = batch_first
        self.layout = Layout(())
        self.outputs: tuple[Output, ...] = ()

    def forward(self, state: Tensor, sequence_lens: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.tape.start(self.layout.unpack(state), sequence_lens)
        returned = self._call(inputs)
        outputs = tuple(output.batch_major(returned[output.index][1]) for output in self.outputs)
        packed = self.layout.pack(self.tape.calls)
        self.tape.start(None, None)
        return (*outputs, packed)

    def record(self, *inputs: Tensor) -> tuple[list[tuple[str, Tensor]], list[Call]]:
        """Run forward as the user wrote it, from the state it asks for; returns its tensors and the calls."""
        self.tape.start(None, None)
        returned = self._call(inputs)
        calls = self.tape.calls
        self.tape.start(None, None)
        return returned, calls

    def _call(self, inputs: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
        return leaves(self.model(**self.arguments(inputs)))

    def arguments(self, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
        """Forward's own arguments, states included, in forward's own layout."""
        arguments: dict[str, Any] = {
            name: constant.expand(inputs[0].shape[0]) for name, constant in self.constants.items()
        }
        for name, tensor in zip(self.names, inputs, strict=True):
            arguments[name] = tensor if self.batch_first else tensor.transpose(0, 1)
        return arguments


def attempt(what: str, run: Callable[[], Any]) -> Any:
    """Call `run`; whatever the user's forward raises becomes ExportError(forward_failed)."""
    try:
        with torch.no_grad():
            return run()
    except ExportError:
        raise
    except Exception as error:
        raise ExportError("forward_failed", f"forward fails on {what}: {first_line(error)}") from error


def torch_runner(module: StreamingModule, *, double: bool, ops: bool = False) -> RunFunction:
    """`module` as the bundle's run function, in float64 or float32, on PyTorch's layers or on the custom ops.

    It raises ExportError(forward_failed) with the sizes it was called with.
    """

    def run(inputs: Arrays, state: np.ndarray, sequence_lens: np.ndarray) -> tuple[Arrays, np.ndarray]:
        tensors = as_tensors(inputs | {"": state}, double=double)
        row = tensors.pop("")
        lens = torch.from_numpy(sequence_lens) if ops else None
        what = f"{len(row)} sequences of {max(sequence_lens)} time steps"
        with double_precision() if double else nullcontext():
            results = attempt(what, lambda: module(row, lens, *tensors.values()))
        *outputs, after = (result.numpy() for result in results)
        return {o.spec.name: array for o, array in zip(module.outputs, outputs, strict=True)}, after

    return run
