"""One step of up to so many rows as a captured graph."""

import numpy as np

from bundle import Manifest
from service.engine.base import Result, Rows
from service.engine.cuda.base import Device, Kernel
from service.engine.cuda.layout import FLAG, INDEX, Layout, input_tensors, output_tensors
from service.engine.cuda.step_model import StepModel, StepTensors
from service.engine.memory import Memory
from service.engine.rows import flagged
from service.state.slots import INITIAL, SCRATCH

GATHER, COMMIT = Kernel("kernels.cu", "gather"), Kernel("kernels.cu", "commit")


class StepMemory:
    """Memory on the device for one call of up to `most` rows: calls follow one another on the stream, and share it."""

    def __init__(self, device: Device, manifest: Manifest, most: int) -> None:
        self.call = device.allocate((_call_layout(manifest, most).nbytes,), np.uint8)
        self.outputs = device.allocate((Layout(output_tensors(manifest, most)).nbytes,), np.uint8)
        self.state = device.allocate((most, manifest.state_size), np.float32)
        self.state_out = device.allocate((most, manifest.state_size), np.float32)


class StepCall:
    """The graph, and the block of host memory that it reads and writes while it runs.

    In the block: where each row's state is taken from and put, and the inputs, which all go to the device; then which
    rows failed, and the outputs. `launch`, then `result`.
    """

    def __init__(
        self, device: Device, model: StepModel, manifest: Manifest, arena: Memory, memory: StepMemory, size: int
    ) -> None:
        self._device, self._arena, self._memory = device, arena, memory
        self._size, self._width, self._gathers = size, manifest.state_size, model.gathers
        call, answered = _call_layout(manifest, size), Layout(output_tensors(manifest, size))
        flags = Layout([((size,), FLAG)])
        self._call_bytes, self._output_bytes = call.nbytes, answered.nbytes
        self._block = device.host_block(call.nbytes + flags.nbytes + answered.nbytes)
        self._sources, self._targets, *self._inputs = call.views(self._block)
        (self._failed,) = flags.views(self._block[call.nbytes :])
        self._outputs = answered.views(self._block[call.nbytes + flags.nbytes :])
        self._failed_at = self._block.ctypes.data + call.nbytes
        self._outputs_at = self._failed_at + flags.nbytes
        sources, self._targets_there, *inputs = call.memories(memory.call)
        rows = (size, self._width)
        state, state_out = (each.at(0, rows, each.dtype) for each in (memory.state, memory.state_out))
        self._checked = _checked(device, manifest, answered)
        self._sources[:], self._targets[:] = INITIAL, SCRATCH
        self._filled = 0
        outputs = answered.memories(memory.outputs)
        for kernel in (GATHER, COMMIT):
            device.prepare(kernel)
        self._queue_model = model.bind(size, StepTensors(inputs, sources, state, state_out, outputs))
        self.graph = device.capture(self._queue)
        self._done = device.mark()

    def launch(self, rows: Rows) -> None:
        count = len(rows.lens)
        self._sources[:count], self._targets[:count] = rows.sources, rows.targets
        self._sources[count : self._filled], self._targets[count : self._filled] = INITIAL, SCRATCH
        self._filled = count
        for given, array in zip(self._inputs, rows.inputs, strict=True):
            given[:count] = array
        self.graph.launch()
        self._done.set()

    def result(self) -> Result:
        """Waits until the graph has run."""
        self._done.wait()
        outputs = tuple([array[: self._filled].copy() for array in self._outputs])
        return outputs, flagged(self._failed[: self._filled])

    def _queue(self) -> None:
        arena, memory, blocks = self._arena.pointer, self._memory, (self._size, 1)
        state = memory.state.pointer if self._gathers else 0
        self._device.run(
            GATHER, blocks, arena, self._width, state, memory.call.pointer, self._block.ctypes.data, self._call_bytes
        )
        self._queue_model()
        self._device.run(
            COMMIT,
            blocks,
            *(arena, self._width, self._targets_there.pointer, memory.state_out.pointer, self._failed_at),
            *(memory.outputs.pointer, self._checked.pointer, self._checked.shape[0]),
            *(self._outputs_at, self._output_bytes),
        )


def _call_layout(manifest: Manifest, size: int) -> Layout:
    """Sources and targets of the rows, and the inputs."""
    return Layout([((size,), INDEX), ((size,), INDEX), *input_tensors(manifest, size)])


def _checked(device: Device, manifest: Manifest, outputs: Layout) -> Memory:
    """What `commit` is to look at: (first byte, floats in a row) of each float output; (tensors, 2) on the device."""
    pairs = [
        (offset, spec.size)
        for offset, spec in zip(outputs.offsets, manifest.outputs, strict=True)
        if spec.dtype == "float32"
    ]
    table = np.array(pairs, INDEX).reshape(-1, 2)
    memory = device.allocate(table.shape, table.dtype)
    device.upload(memory.pointer, table)
    return memory
