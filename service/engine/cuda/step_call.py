"""Steps as a captured graph: one step, or several consecutive steps of the same rows."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from unroll.bundle import Manifest
from unroll.service.core.errors import UnrollError
from unroll.service.engine.cuda.device import Device, Graph, Kernel
from unroll.service.engine.cuda.layout import FLAG, INDEX, BlockLayout, input_tensors, output_tensors
from unroll.service.engine.cuda.step_model import StepModel, StepTensors
from unroll.service.engine.engine import Tensors
from unroll.service.engine.rows import flagged
from unroll.service.engine.tensor_ref import TensorRef
from unroll.service.state.slots import INITIAL

GATHER, COMMIT = Kernel("kernels.cu", "gather"), Kernel("kernels.cu", "commit")

#: Target of a padding row, and of a row that has no more steps.
NOWHERE = -1


class StepMemory:
    """Device memory for a step of up to `most` rows; all steps share it, since the stream runs one at a time."""

    def __init__(self, device: Device, manifest: Manifest, most: int) -> None:
        self.call = device.allocate((_call_layout(manifest, most).nbytes,), np.uint8)
        self.outputs = device.allocate((BlockLayout(output_tensors(manifest, most)).nbytes,), np.uint8)
        self.state = device.allocate((most, manifest.state_size), np.float32)
        self.state_out = device.allocate((most, manifest.state_size), np.float32)
        self.failed = device.allocate((most,), FLAG)


class StepCall:
    """A captured graph, and the block of host memory that it reads and writes.

    The block holds for each step whether it is the batch's first, the source and target of each row, and the inputs;
    then the failure flags; then the outputs of each step. `launch` fills it, `wait` returns when the outputs are in it.
    """

    def __init__(
        self,
        device: Device,
        model: StepModel,
        manifest: Manifest,
        arena: TensorRef,
        memory: StepMemory,
        size: int,
        steps: int = 1,
    ) -> None:
        self._device, self._arena, self._memory = device, arena, memory
        self._size, self._steps, self._width, self._gathers = size, steps, manifest.state_size, model.gathers
        self._call, self._answer = _call_layout(manifest, size), BlockLayout(output_tensors(manifest, size))
        flags = BlockLayout([((size,), FLAG)])
        block = device.host_block(steps * self._call.nbytes + flags.nbytes + steps * self._answer.nbytes)
        self._calls_at = block.ctypes.data
        self._failed_at = self._calls_at + steps * self._call.nbytes
        self._answers_at = self._failed_at + flags.nbytes
        calls, rest = np.split(block, [steps * self._call.nbytes])
        #: (steps, 1), (steps, size), (steps, size), and each input (steps, size, 1, *shape).
        self._first, self._sources, self._targets, *self._inputs = self._call.repeated(calls, steps)
        (self._failed,) = flags.views(rest)
        self._outputs = self._answer.repeated(rest[flags.nbytes :], steps)
        self._sources[:], self._targets[:] = INITIAL, NOWHERE
        self._filled = 0
        self._checked = _checked(device, manifest, self._answer)
        _, sources, targets, *inputs = self._call.memories(memory.call)
        self._targets_there = targets.pointer
        rows = (size, self._width)
        state, state_out = (each.at(0, rows, each.dtype) for each in (memory.state, memory.state_out))
        for kernel in (GATHER, COMMIT):
            device.prepare(kernel)
        outputs = self._answer.memories(memory.outputs)
        self._queue_model = model.bind(size, StepTensors(inputs, sources, state, state_out, outputs))
        self.graph: Graph = device.capture(self._queue)
        self._done = device.event()

    def launch(
        self,
        inputs: Tensors,
        sources: Sequence[int] | np.ndarray,
        targets: Sequence[int] | np.ndarray,
        *,
        first: bool = True,
    ) -> None:
        """Start the steps.

        Args:
            inputs: Each (rows, steps, *shape), with at most the graph's steps.
            sources: Slots to read states from, (rows,) or (steps, rows).
            targets: Slots to write states to, (rows,) or (steps, rows).
            first: These are the batch's first steps, so no row has failed yet.
        """
        rows, steps = inputs[0].shape[:2]
        self._first[0] = first
        self._sources[:steps, :rows], self._targets[:steps, :rows] = sources, targets
        self._targets[:, rows : self._filled] = NOWHERE
        self._targets[steps:, :rows] = NOWHERE
        self._filled = rows
        for given, array in zip(self._inputs, inputs, strict=True):
            given[:steps, :rows, 0] = array.swapaxes(0, 1)
        self.graph.launch()
        self._done.record()

    def wait(self) -> None:
        self._done.wait()

    def answers(self, steps: int) -> list[np.ndarray]:
        """Return views of the outputs, each (steps, rows, 1, *shape), or (steps, rows, *shape) without time."""
        return [array[:steps, : self._filled] for array in self._outputs]

    def failed(self) -> dict[int, UnrollError]:
        return flagged(self._failed[: self._filled])

    def without_transfers(self) -> Graph:
        """Return the same graph without the copies from and to the host, to measure the device's own work."""
        return self._device.capture(partial(self._queue, transfers=False))

    def _queue(self, *, transfers: bool = True) -> None:
        arena, memory, blocks = self._arena.pointer, self._memory, (self._size, 1)
        first, sources, *_ = self._call.offsets
        state = memory.state.pointer if self._gathers else 0
        for step in range(self._steps):
            call, answer = self._calls_at + step * self._call.nbytes, self._answers_at + step * self._answer.nbytes
            self._device.run(
                GATHER,
                blocks,
                *(arena, self._width, call + sources, state, memory.failed.pointer, call + first),
                *(memory.call.pointer, call, self._call.nbytes * transfers),
            )
            self._queue_model()
            self._device.run(
                COMMIT,
                blocks,
                *(arena, self._width, self._targets_there, memory.state_out.pointer, memory.failed.pointer),
                *(self._failed_at, memory.outputs.pointer, self._checked.pointer, self._checked.shape[0]),
                *(answer, self._answer.nbytes * transfers),
            )


def _call_layout(manifest: Manifest, size: int) -> BlockLayout:
    """One step: the first-step flag, the sources and targets of the rows, the inputs."""
    return BlockLayout([((1,), INDEX), ((size,), INDEX), ((size,), INDEX), *input_tensors(manifest, size)])


def _checked(device: Device, manifest: Manifest, outputs: BlockLayout) -> TensorRef:
    """Return a table for `commit`: first byte and floats per row of each float output; (tensors, 2) on the device."""
    pairs = [
        (offset, spec.size)
        for offset, spec in zip(outputs.offsets, manifest.outputs, strict=True)
        if spec.dtype == "float32"
    ]
    table = np.array(pairs, INDEX).reshape(-1, 2)
    memory = device.allocate(table.shape, table.dtype)
    device.upload(memory.pointer, table)
    return memory
