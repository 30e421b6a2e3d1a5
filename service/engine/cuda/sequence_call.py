"""Runs rows of any length in one call, padded to the longest, and commits the rows with finite outputs."""

import numpy as np

from unroll.bundle import Manifest
from unroll.service.core.errors import UnrollError
from unroll.service.engine.cuda.device import Device
from unroll.service.engine.cuda.layout import FLAG, INDEX, BlockLayout, output_tensors
from unroll.service.engine.cuda.step_call import COMMIT, GATHER
from unroll.service.engine.engine import BatchResult, Rows
from unroll.service.engine.rows import flagged, non_finite
from unroll.service.engine.runner import Runner
from unroll.service.engine.tensor_ref import TensorRef
from unroll.service.state.slots import SCRATCH


class SequenceCall:
    """Calls of the whole graph. Device memory is allocated on demand and kept."""

    def __init__(self, device: Device, runner: Runner, manifest: Manifest, arena: TensorRef) -> None:
        self._device, self._runner, self._manifest, self._arena = device, runner, manifest, arena
        self._memory = device.allocate((0,), np.uint8)
        self._block = device.host_block(1)

    def run(self, rows: Rows) -> BatchResult:
        count, width = len(rows.lens), self._manifest.state_size
        inputs = [np.ascontiguousarray(array) for array in rows.inputs]
        tensors = [(array.shape, array.dtype) for array in inputs]
        tensors += output_tensors(self._manifest, count, max(rows.lens))
        layout = BlockLayout([*tensors, *[((count, width), self._arena.dtype)] * 2, ((count,), FLAG)])
        *places, state, state_out, failed_there = layout.memories(self._device_memory(layout.nbytes))
        given, answered = places[: len(inputs)], places[len(inputs) :]
        indices = BlockLayout([((1,), INDEX), ((count,), INDEX), ((count,), INDEX), ((count,), FLAG)])
        block = self._host_block(indices.nbytes)
        first, sources, targets, flags = indices.views(block)
        first[:], sources[:], targets[:] = True, rows.sources, rows.targets
        first_at, sources_at, targets_at, flags_at = (block.ctypes.data + offset for offset in indices.offsets)
        arena = self._arena.pointer

        for place, array in zip(given, inputs, strict=True):
            self._device.upload(place.pointer, array)
        flagged_at = failed_there.pointer
        self._device.run(GATHER, (count, 1), arena, width, sources_at, state.pointer, flagged_at, first_at, 0, 0, 0)
        try:
            self._runner.bind([*given, state], np.array(rows.lens, np.int32), [*answered, state_out]).run()
        except Exception:
            self._device.synchronize()  # raises DeviceFailed if the device is at fault
            raise
        outputs = tuple(np.empty(place.shape, place.dtype) for place in answered)
        for array, place in zip(outputs, answered, strict=True):
            self._device.download(array, place.pointer)
        failed: dict[int, UnrollError] = {}
        if not all(np.isfinite(array).all() for array in outputs):
            failed = non_finite(self._manifest, outputs, rows.lens)
            targets[list(failed)] = SCRATCH
        self._device.run(
            COMMIT,
            (count, 1),
            *(arena, width, targets_at, state_out.pointer, flagged_at, flags_at),
            *(0, 0, 0, 0, 0),
        )
        self._device.synchronize()
        return outputs, flagged(flags) | failed

    def _device_memory(self, nbytes: int) -> TensorRef:
        if self._memory.nbytes < nbytes:
            larger = self._device.allocate((nbytes,), np.uint8)
            self._device.free(self._memory)
            self._memory = larger
        return self._memory

    def _host_block(self, nbytes: int) -> np.ndarray:
        if len(self._block) < nbytes:
            self._block = self._device.host_block(2 * nbytes)
        return self._block
