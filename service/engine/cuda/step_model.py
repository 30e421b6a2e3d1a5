"""The model's part of a step: the whole graph in onnxruntime, or each recurrent layer in a kernel of our own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from unroll.bundle import Manifest
from unroll.service.engine.cuda.cells import CellKernel
from unroll.service.engine.cuda.device import Device
from unroll.service.engine.cuda.parts import Layer, Segment
from unroll.service.engine.runner import BindPart, BoundCall, Runner
from unroll.service.engine.tensor_ref import TensorRef

#: Runs until onnxruntime has allocated all memory of a call, which a capture forbids: it plans the memory in the first
#: run and allocates it in the second.
_WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step's tensors on the device.

    Attributes:
        inputs: The model's inputs, each (size, 1, *shape).
        sources: Rows of the arena that hold the states, (size,) int64.
        state, state_out: (size, state_size).
        outputs: The model's outputs, each (size, 1, *shape), or (size, *shape) without time.
    """

    inputs: Sequence[TensorRef]
    sources: TensorRef
    state: TensorRef
    state_out: TensorRef
    outputs: Sequence[TensorRef]


class WholeModel:
    """The whole graph.

    gathers: The states must be gathered into `state` first. Otherwise the model reads them from the arena.
    """

    gathers = True

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def bind(self, size: int, tensors: StepTensors) -> Callable[[], None]:
        """Return a function that queues a step of `size` rows. It neither waits nor allocates memory."""
        inputs, outputs = [*tensors.inputs, tensors.state], [*tensors.outputs, tensors.state_out]
        call = self._runner.bind(inputs, np.ones(size, np.int32), outputs)
        _warm_up(call)
        return call.queue


class SeparateModel:
    """Recurrent layers in kernels of our own, and the segments of the graph between them in onnxruntime.

    Raises:
        CompilationFailed: The device is too old for the kernels.
    """

    gathers = False

    def __init__(
        self,
        device: Device,
        runner: Runner,
        manifest: Manifest,
        arena: TensorRef,
        parts: Sequence[Layer | Segment],
        most: int,
        *,
        tf32: bool,
    ) -> None:
        self._manifest, self._arena, self._parts = manifest, arena, parts
        layers = [part for part in parts if isinstance(part, Layer)]
        self._layers = {layer.y: CellKernel(device, layer, manifest.state_size, tf32=tf32) for layer in layers}
        self._segments = {part.outputs[0]: runner.part(part.model) for part in parts if isinstance(part, Segment)}
        #: Tensors between the parts, by name.
        self._between: dict[str, TensorRef] = {}
        for layer in layers:
            self._between[layer.y] = device.allocate((most, layer.hidden), np.float32)
            if layer.x in self._segments:
                self._between[layer.x] = device.allocate((most, layer.inputs), np.float32)

    def bind(self, size: int, tensors: StepTensors) -> Callable[[], None]:
        named = dict(self._between)
        named |= zip([spec.name for spec in self._manifest.inputs], tensors.inputs, strict=True)
        named |= zip([spec.name for spec in self._manifest.outputs], tensors.outputs, strict=True)
        bound: list[Callable[[], None]] = []
        before: Layer | Segment | None = None
        for part in self._parts:
            if isinstance(part, Segment):
                bound.append(_bind_segment(self._segments[part.outputs[0]], part, size, named))
            else:
                memory = (named[part.x], self._arena, tensors.sources, tensors.state_out, named[part.y])
                bound.append(self._layers[part.y].bind(size, *memory, overlaps_previous=isinstance(before, Layer)))
            before = part

        def queue() -> None:
            for each in bound:
                each()

        return queue


StepModel = WholeModel | SeparateModel


def _bind_segment(bind: BindPart, segment: Segment, size: int, named: dict[str, TensorRef]) -> Callable[[], None]:
    def memory(name: str, source: str) -> TensorRef:
        shape = tuple(size if length == -1 else length for length in segment.shapes[name])
        return named[source].at(0, shape, named[source].dtype)

    call = bind(
        {name: memory(name, source) for name, source in segment.inputs.items()},
        {name: memory(name, name) for name in segment.outputs},
    )
    _warm_up(call)
    return call.queue


def _warm_up(call: BoundCall) -> None:
    for _ in range(_WARM_UPS):
        call.run()
