"""The engine with its rows on a GPU. No state crosses to the host but to be saved, restored or verified.

A batch of single steps is one launch of a graph that was captured at start, for its bucket: gather the rows, call the
model, commit the rows. Everything else (chunks, whole sequences) is queued call by call on the same stream.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import structlog

from bundle import Manifest
from service.core.errors import UnrollError
from service.engine.base import LAUNCHED, DeviceFailed, PlainRows, Result, Rows
from service.engine.cuda.base import CompilationFailed, Device, Graph, OutOfDeviceMemory
from service.engine.cuda.layout import bucket_of
from service.engine.cuda.parts import Layer, Segment
from service.engine.cuda.sequence_call import SequenceCall
from service.engine.cuda.step_call import StepCall, StepMemory
from service.engine.cuda.step_model import SeparateModel, StepModel, WholeModel
from service.engine.rows import empty_outputs, one_by_one
from service.engine.runner import Runner
from service.state.slots import INITIAL, SCRATCH

_log = structlog.get_logger(__name__)


class CudaEngine:
    """rows: rows of the arena, the initial and the scratch row included. buckets: sizes of the captured calls of single
    steps, ascending; none for a model that takes whole sequences only. The runner must run on the device's stream.
    parts: of the graph, if its layers are to be run by kernels of ours; tf32: in TF32's accuracy.

    `captured`: are steps run by graphs? A model of which a part runs on the CPU cannot be captured: its steps are run
    as sequences are. Raises OutOfDeviceMemory, CompilationFailed, DeviceFailed.
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
        self.write(INITIAL, manifest.initial_row())
        self._sequences = SequenceCall(device, runner, manifest, self._arena)
        self._buckets = list(buckets)
        self._steps: dict[int, list[StepCall]] = {}
        model: StepModel = WholeModel(runner)
        if parts:
            model = SeparateModel(device, runner, manifest, self._arena, parts, most, tf32=tf32)
        try:
            self._steps = self._capture(model)
        except (CompilationFailed, DeviceFailed, OutOfDeviceMemory):
            raise
        except Exception as error:  # onnxruntime's, from inside the capture; they have no base class of their own
            device.synchronize()
            name = f"{manifest.name}:{manifest.version}"
            _log.warning("steps run without a graph", model=name, device=device.name, reason=str(error))
        self.captured = bool(self._steps)
        #: Are sequences run step by step, too? Then they are the same to the bit, and sooner done.
        self._stepwise = self.captured and bool(parts)

    def __repr__(self) -> str:
        captured = f"graphs of {self._buckets} rows" if self.captured else "no graphs"
        return f"<CudaEngine {self._arena.shape[0]} rows on {self._device.name}, {captured}>"

    def run(self, rows: Rows) -> Result:
        if (result := self.launch(rows)) is not None:
            return result()
        if self._stepwise and len(rows.lens) <= self._buckets[-1]:
            return self._run_stepwise(rows)
        return one_by_one(self._manifest, self._sequences.run, rows)

    def launch(self, rows: Rows) -> Callable[[], Result] | None:
        if not self._steps or len(rows.lens) > self._buckets[-1] or max(rows.lens) > 1:
            return None
        return self._launch(rows)

    def _launch(self, rows: Rows) -> Callable[[], Result]:
        calls = self._steps[bucket_of(self._buckets, len(rows.lens))]
        calls.append(calls.pop(0))  # in turn: a call's memory is in use until its result is fetched
        calls[-1].launch(rows)
        return calls[-1].result

    def _run_stepwise(self, rows: Rows) -> Result:
        """States are in rows of the engine's own until a row's last step, so that one that fails changes nothing."""
        count, longest = len(rows.lens), max(rows.lens)
        own = np.arange(self._rows, self._rows + count)
        sources, targets, lens = np.array(rows.sources), np.array(rows.targets), np.array(rows.lens)
        outputs = empty_outputs(self._manifest, count, longest)
        failed: dict[int, UnrollError] = {}
        waiting: deque[tuple[int, Callable[[], Result]]] = deque()

        def take() -> None:
            step, result = waiting.popleft()
            values, errors = result()
            for into, value, spec in zip(outputs, values, self._manifest.outputs, strict=True):
                if spec.time:
                    into[:, step] = value[:, 0]
                else:
                    into[lens == step + 1] = value[lens == step + 1]
            for row, error in errors.items():
                if step < lens[row]:
                    failed.setdefault(row, error)

        for step in range(longest):
            ends, over = lens == step + 1, lens <= step
            while waiting and (len(waiting) == LAUNCHED or ends.any()):
                take()  # before a row's state is put where it belongs, it is known whether the row has failed
            to = np.where(ends, targets, own)
            to[over] = SCRATCH
            to[list(failed)] = SCRATCH
            inputs = tuple(array[:, step : step + 1] for array in rows.inputs)
            waiting.append((step, self._launch(PlainRows(inputs, [1] * count, sources if step == 0 else own, to))))
        while waiting:
            take()
        return outputs, failed

    def close(self) -> None:
        self._steps = {}
        self._device.close()

    def graph(self, rows: int) -> Graph:
        """What is launched for so many rows, with whatever its last call left there: to be looked at and measured."""
        return self._steps[bucket_of(self._buckets, rows)][-1].graph

    def read(self, slot: int) -> np.ndarray:
        row = np.empty(self._manifest.state_size, np.float32)
        self._device.download(row, self._address(slot))
        return row

    def write(self, slot: int, row: np.ndarray) -> None:
        self._device.upload(self._address(slot), np.ascontiguousarray(row, np.float32))

    def copy(self, source: int, target: int) -> None:
        self._device.copy(self._address(target), self._address(source), self._row_bytes)

    @property
    def _row_bytes(self) -> int:
        return self._manifest.state_size * self._arena.dtype.itemsize

    def _address(self, slot: int) -> int:
        return self._arena.pointer + slot * self._row_bytes

    def _capture(self, model: StepModel) -> dict[int, list[StepCall]]:
        if not self._buckets:
            return {}
        memory = StepMemory(self._device, self._manifest, self._buckets[-1])

        def call(size: int) -> StepCall:
            return StepCall(self._device, model, self._manifest, self._arena, memory, size)

        return {size: [call(size) for _ in range(LAUNCHED)] for size in self._buckets}
