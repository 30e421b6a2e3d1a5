"""One step of up to so many rows as a captured graph."""

from contextlib import suppress

import numpy as np

from bundle import Manifest
from service.engine.base import Result, Rows
from service.engine.cuda.base import Device
from service.engine.cuda.layout import FLAG, INDEX, Layout, input_tensors, output_tensors
from service.engine.memory import Memory
from service.engine.rows import flagged
from service.engine.runner import Runner
from service.state.slots import INITIAL, SCRATCH

#: Runs until onnxruntime has all the memory that the call needs, for within a capture none can be taken: it plans it in
#: the first, takes it in the second, and has had it in the third.
_WARM_UPS = 3


class StepMemory:
    """Memory on the device for one call of up to `most` rows: calls follow one another on the stream, and share it."""

    def __init__(self, device: Device, manifest: Manifest, most: int) -> None:
        self.inputs = device.allocate((Layout(input_tensors(manifest, most)).nbytes,), np.uint8)
        self.outputs = device.allocate((Layout(output_tensors(manifest, most)).nbytes,), np.uint8)
        self.state = device.allocate((most, manifest.state_size), np.float32)
        self.state_out = device.allocate((most, manifest.state_size), np.float32)


class StepCall:
    """The graph, and the block of host memory that it reads and writes while it runs.

    In the block: where each row's state is taken from and put, and the inputs; then which rows failed, and the
    outputs. `launch`, then `result`.
    """

    def __init__(
        self, device: Device, runner: Runner, manifest: Manifest, arena: Memory, memory: StepMemory, size: int
    ) -> None:
        self._device, self._arena, self._memory = device, arena, memory
        self._size, self._width = size, manifest.state_size
        given, answered = input_tensors(manifest, size), output_tensors(manifest, size)
        layout = Layout([((size,), INDEX), ((size,), INDEX), *given, ((size,), FLAG), *answered])
        self._block = device.host_block(layout.nbytes)
        views = layout.views(self._block)
        (self._sources, self._targets), self._inputs = views[:2], views[2 : 2 + len(given)]
        self._failed, self._outputs = views[2 + len(given)], views[3 + len(given) :]
        self._offsets = [*layout.offsets, layout.nbytes]
        self._checked = _checked(device, manifest, Layout(answered))
        rows = (size, self._width)
        self._call = runner.bind(
            [*Layout(given).memories(memory.inputs), memory.state.at(0, rows, memory.state.dtype)],
            np.ones(size, np.int32),
            [*Layout(answered).memories(memory.outputs), memory.state_out.at(0, rows, memory.state.dtype)],
        )
        self._sources[:], self._targets[:] = INITIAL, SCRATCH
        self._filled = 0
        for _ in range(_WARM_UPS):
            self._call.run()
        try:
            self.graph = device.capture(self._queue)
        except Exception:
            with suppress(Exception):
                self._call.run()  # onnxruntime's own copy of CUDA's runtime reports the same error once more
            raise
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
        first, inputs = self._block.ctypes.data, len(self._inputs)
        sources, targets, given, *_ = [first + offset for offset in self._offsets]
        failed, answered, end = (first + self._offsets[i] for i in (2 + inputs, 3 + inputs, -1))
        arena, memory, checked = self._arena.pointer, self._memory, self._checked
        self._device.run(
            "gather",
            self._size,
            *(arena, self._width, sources, memory.state.pointer),
            *(memory.inputs.pointer, given, failed - given),
        )
        self._call.queue()
        self._device.run(
            "commit",
            self._size,
            *(arena, self._width, targets, memory.state_out.pointer, failed),
            *(memory.outputs.pointer, checked.pointer, checked.shape[0], answered, end - answered),
        )


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
