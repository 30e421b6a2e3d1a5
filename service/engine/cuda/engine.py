"""The engine with its rows on a GPU. No state crosses to the host but to be saved, restored or verified.

A batch of single steps is one launch of a graph that was captured at start, for its bucket: gather the rows, call the
model, commit the rows. Everything else (chunks, whole sequences) is queued call by call on the same stream.
"""

from collections.abc import Callable, Sequence

import numpy as np
import structlog

from bundle import Manifest
from service.engine.base import LAUNCHED, DeviceFailed, Result, Rows
from service.engine.cuda.base import Device, Graph
from service.engine.cuda.layout import bucket_of
from service.engine.cuda.sequence_call import SequenceCall
from service.engine.cuda.step_call import StepCall, StepMemory
from service.engine.rows import one_by_one
from service.engine.runner import Runner
from service.state.slots import INITIAL

_log = structlog.get_logger(__name__)


class CudaEngine:
    """rows: rows of the arena, the initial and the scratch row included. buckets: sizes of the captured calls of single
    steps, ascending; none for a model that takes whole sequences only. The runner must run on the device's stream.

    `captured`: are steps run by graphs? A model of which a part runs on the CPU cannot be captured: its steps are run
    as sequences are. Raises OutOfDeviceMemory, DeviceFailed.
    """

    def __init__(self, device: Device, runner: Runner, manifest: Manifest, rows: int, buckets: Sequence[int]) -> None:
        self._device = device
        self._manifest = manifest
        self._arena = device.allocate((rows, manifest.state_size), np.float32)
        self.write(INITIAL, manifest.initial_row())
        self._sequences = SequenceCall(device, runner, manifest, self._arena)
        self._buckets = list(buckets)
        self._steps: dict[int, list[StepCall]] = {}
        try:
            self._steps = self._capture(runner)
        except DeviceFailed:
            raise
        except Exception as error:  # onnxruntime's, from inside the capture; they have no base class of their own
            device.synchronize()
            name = f"{manifest.name}:{manifest.version}"
            _log.warning("steps run without a graph", model=name, device=device.name, reason=str(error))
        self.captured = bool(self._steps)

    def __repr__(self) -> str:
        captured = f"graphs of {self._buckets} rows" if self.captured else "no graphs"
        return f"<CudaEngine {self._arena.shape[0]} rows on {self._device.name}, {captured}>"

    def run(self, rows: Rows) -> Result:
        if (result := self.launch(rows)) is not None:
            return result()
        return one_by_one(self._manifest, self._sequences.run, rows)

    def launch(self, rows: Rows) -> Callable[[], Result] | None:
        count = len(rows.lens)
        if not self._steps or count > self._buckets[-1] or max(rows.lens) > 1:
            return None
        calls = self._steps[bucket_of(self._buckets, count)]
        calls.append(calls.pop(0))  # in turn: a call's memory is in use until its result is fetched
        calls[-1].launch(rows)
        return calls[-1].result

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

    def _capture(self, runner: Runner) -> dict[int, list[StepCall]]:
        if not self._buckets:
            return {}
        memory = StepMemory(self._device, self._manifest, self._buckets[-1])

        def call(size: int) -> StepCall:
            return StepCall(self._device, runner, self._manifest, self._arena, memory, size)

        return {size: [call(size) for _ in range(LAUNCHED)] for size in self._buckets}
