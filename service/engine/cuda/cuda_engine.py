"""The engine that keeps the state rows on a GPU. States reach the host only to be saved, restored or verified.

A batch of single steps is one launch of a graph that was captured at start for its bucket: gather the rows, run the
model, commit the rows. If kernels of our own run the layers, chunks and sequences are the same steps, several in one
graph. Otherwise they are calls of the whole graph on the same stream.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import structlog

from unroll.bundle import Manifest
from unroll.service.core.errors import UnrollError
from unroll.service.engine.cuda.device import CompilationFailed, Device, Graph, OutOfDeviceMemory
from unroll.service.engine.cuda.layout import bucket_of
from unroll.service.engine.cuda.parts import Layer, Segment
from unroll.service.engine.cuda.sequence_call import SequenceCall
from unroll.service.engine.cuda.step_call import NOWHERE, StepCall, StepMemory
from unroll.service.engine.cuda.step_model import SeparateModel, StepModel, WholeModel
from unroll.service.engine.engine import MAX_LAUNCHED, BatchResult, DeviceFailed, Rows
from unroll.service.engine.rows import empty_outputs, one_by_one
from unroll.service.engine.runner import Runner
from unroll.service.state.slots import INITIAL

#: Steps of a graph for sequences and chunks, and how many must remain for it to be worth its padding.
SEVERAL, _WORTHWHILE = 16, 4

_log = structlog.get_logger(__name__)


class CudaEngine:
    """An engine on a GPU.

    Args:
        runner: Runs the graph on the device's stream.
        rows: Rows of the arena, the initial and the scratch row included.
        buckets: Row counts of the captured single-step calls, ascending; none for a model that takes whole sequences.
        parts: The graph in parts, if kernels of our own run the layers.
        tf32: Those kernels compute in TF32's accuracy.

    Attributes:
        captured: Steps run as captured graphs. A model that runs partly on the CPU cannot be captured, so its steps
            run as sequences.

    Raises:
        OutOfDeviceMemory, CompilationFailed, DeviceFailed: The engine cannot be created.
    """

    def __init__(
        self,
        device: Device,
        runner: Runner,
        manifest: Manifest,
        rows: int,
        buckets: Sequence[int],
        parts: Sequence[Layer | Segment] = (),
        *,
        tf32: bool = False,
    ) -> None:
        self._device = device
        self._manifest = manifest
        most = buckets[-1] if buckets else 0
        self._rows = rows
        self._arena = device.allocate((rows + most, manifest.state_size), np.float32)
        self.write(INITIAL, manifest.blank_row())
        self._sequences = SequenceCall(device, runner, manifest, self._arena)
        self._buckets = list(buckets)
        self._steps: dict[tuple[int, int], list[StepCall]] = {}
        model: StepModel = WholeModel(runner)
        if parts:
            model = SeparateModel(device, runner, manifest, self._arena, parts, most, tf32=tf32)
        try:
            self._steps = self._capture(model, (1, SEVERAL) if parts else (1,))
        except (CompilationFailed, DeviceFailed, OutOfDeviceMemory):
            raise
        except Exception as error:  # noqa: BLE001 onnxruntime's, which have no common base class
            device.synchronize()
            name = f"{manifest.name}:{manifest.version}"
            _log.warning("steps run without a graph", model=name, device=device.name, reason=str(error))
        self.captured = bool(self._steps)
        #: Sequences run step by step as well, which is faster and gives the same bits as single steps.
        self._stepwise = self.captured and bool(parts)

    def run(self, rows: Rows) -> BatchResult:
        if (result := self.launch(rows)) is not None:
            return result()
        if self._stepwise and len(rows.lens) <= self._buckets[-1]:
            return self._run_stepwise(rows)
        return one_by_one(self._manifest, self._sequences.run, rows)

    def launch(self, rows: Rows) -> Callable[[], BatchResult] | None:
        if not self._steps or len(rows.lens) > self._buckets[-1] or rows.inputs[0].shape[1] > 1:
            return None
        call = self._next_call(len(rows.lens), 1)
        call.launch(rows.inputs, rows.sources, rows.targets)

        def result() -> BatchResult:
            call.wait()
            return tuple([array[0].copy() for array in call.answers(1)]), call.failed()

        return result

    def _next_call(self, rows: int, steps: int) -> StepCall:
        """Return the calls of this size in turn, because a call's memory is in use until its answers are fetched."""
        calls = self._steps[bucket_of(self._buckets, rows), steps]
        calls.append(calls.pop(0))
        return calls[-1]

    def _run_stepwise(self, rows: Rows) -> BatchResult:
        """Run several steps at a time.

        Until its last step, a row's state stays in a private row of the engine. The last step writes it to its target
        unless a step failed.
        """
        count, longest, lens = len(rows.lens), rows.inputs[0].shape[1], np.array(rows.lens)
        own = np.arange(self._rows, self._rows + count)
        outputs = empty_outputs(self._manifest, count, longest)
        waiting: deque[tuple[StepCall, int, int]] = deque()
        failed: dict[int, UnrollError] = {}

        def take() -> None:
            call, begin, steps = waiting.popleft()
            call.wait()
            last = lens - 1 - begin
            ends = np.flatnonzero((last >= 0) & (last < steps))
            for into, answer, spec in zip(outputs, call.answers(steps), self._manifest.outputs, strict=True):
                if spec.time:
                    into[:, begin : begin + steps] = answer[:, :, 0].swapaxes(0, 1)
                else:
                    into[ends] = answer[last[ends], ends]
            failed.update(call.failed())

        begin = 0
        while begin < longest:
            at_once = SEVERAL if longest - begin >= _WORTHWHILE else 1
            numbers = np.arange(begin, min(begin + at_once, longest))[:, None]
            sources = np.where(numbers == 0, rows.sources, own)
            targets = np.where(lens == numbers + 1, rows.targets, own)
            targets[lens <= numbers] = NOWHERE
            if len(waiting) == MAX_LAUNCHED:
                take()
            call = self._next_call(count, at_once)
            inputs = tuple(array[:, begin : begin + len(numbers)] for array in rows.inputs)
            call.launch(inputs, sources, targets, first=begin == 0)
            waiting.append((call, begin, len(numbers)))
            begin += len(numbers)
        while waiting:
            take()
        return outputs, failed

    def close(self) -> None:
        self._steps = {}
        self._device.close()

    def graph(self, rows: int, *, transfers: bool = True) -> Graph:
        """Return the graph for a step of `rows` rows, to inspect and measure it.

        Args:
            transfers: Include the copies between host and device.
        """
        call = self._steps[bucket_of(self._buckets, rows), 1][-1]
        return call.graph if transfers else call.without_transfers()

    def read(self, slot: int) -> np.ndarray:
        row = np.empty(self._manifest.state_size, np.float32)
        self._device.download(row, self._address(slot))
        return row

    def read_rows(self, slots: Sequence[int]) -> np.ndarray:
        rows = np.empty((len(slots), self._manifest.state_size), np.float32)
        self._device.download_rows(rows, [self._address(slot) for slot in slots])
        return rows

    def write(self, slot: int, row: np.ndarray) -> None:
        self._device.upload(self._address(slot), np.ascontiguousarray(row, np.float32))

    def copy(self, source: int, target: int) -> None:
        self._device.copy(self._address(target), self._address(source), self._row_bytes)

    @property
    def _row_bytes(self) -> int:
        return self._manifest.state_size * self._arena.dtype.itemsize

    def _address(self, slot: int) -> int:
        return self._arena.pointer + slot * self._row_bytes

    def _capture(self, model: StepModel, lengths: Sequence[int]) -> dict[tuple[int, int], list[StepCall]]:
        if not self._buckets:
            return {}
        memory = StepMemory(self._device, self._manifest, self._buckets[-1])

        def call(size: int, steps: int) -> StepCall:
            return StepCall(self._device, model, self._manifest, self._arena, memory, size, steps)

        return {
            (size, steps): [call(size, steps) for _ in range(MAX_LAUNCHED)]
            for size in self._buckets
            for steps in lengths
        }
