"""The engine that keeps the state rows in host memory."""

from collections.abc import Sequence

import numpy as np

from unroll.bundle import Manifest
from unroll.service.core.errors import UnrollError
from unroll.service.engine.engine import BatchResult, Rows, Tensors
from unroll.service.engine.rows import all_finite, non_finite, one_by_one
from unroll.service.engine.runner import BoundCall, Runner
from unroll.service.engine.tensor_ref import TensorRef
from unroll.service.state.slots import INITIAL

#: Largest call on bound memory. In larger calls the cost of passing arrays does not matter.
_BOUND_ROWS = 256


class HostEngine:
    """An engine in host memory. rows: rows of the arena, including the initial and the scratch row."""

    def __init__(self, runner: Runner, manifest: Manifest, rows: int) -> None:
        self._runner = runner
        self._manifest = manifest
        self._buffers = StepBuffers(runner, manifest, _BOUND_ROWS)
        self._states = np.zeros((rows, manifest.state_size), np.float32)  # a row takes memory once it is written
        self.write(INITIAL, manifest.blank_row())

    def run(self, rows: Rows) -> BatchResult:
        return one_by_one(self._manifest, self._run, rows)

    def launch(self, rows: Rows) -> None:
        """Return None: the host runs a batch only while the caller waits."""

    def close(self) -> None:
        """Do nothing: Python frees the memory."""

    def read(self, slot: int) -> np.ndarray:
        return self._states[slot].copy()

    def read_rows(self, slots: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return copies of state rows, in `out` if it is given."""
        return self._states.take(slots, axis=0, out=out, mode="clip")  # "raise" would copy twice

    def write(self, slot: int, row: np.ndarray) -> None:
        self._states[slot] = row

    def copy(self, source: int, target: int) -> None:
        self._states[target] = self._states[source]

    def _run(self, rows: Rows) -> BatchResult:
        if rows.inputs[0].shape[1] == 1 and len(rows.lens) <= _BOUND_ROWS:
            outputs, state_out = self._run_steps(rows)
        else:
            inputs = {spec.name: array for spec, array in zip(self._manifest.inputs, rows.inputs, strict=True)}
            state, lens = self.read_rows(rows.sources), np.array(rows.lens, np.int32)
            by_name, state_out = self._runner(inputs, state, lens)
            outputs = tuple(by_name[spec.name] for spec in self._manifest.outputs)
        failed: dict[int, UnrollError] = {}
        if not all(map(all_finite, (state_out, *outputs))):
            failed = non_finite(self._manifest, outputs, rows.lens, state_out)
        if failed:
            good = [i for i in range(len(rows.lens)) if i not in failed]
            self._states[[rows.targets[i] for i in good]] = state_out[good]
        else:
            self._states[rows.targets] = state_out
        return outputs, failed

    def _run_steps(self, rows: Rows) -> tuple[Tensors, np.ndarray]:
        """Run single steps. Returns the outputs, and the new states in memory that the next call overwrites."""
        buffers, count = self._buffers, len(rows.lens)
        for bound, array in zip(buffers.inputs, rows.inputs, strict=True):
            bound[:count] = array
        self.read_rows(rows.sources, out=buffers.state[:count])
        buffers.run(count)
        return tuple([array[:count].copy() for array in buffers.outputs]), buffers.state_out[:count]


class StepBuffers:
    """Single-step calls of up to `max_rows` rows, on bound memory.

    Fill the first rows of `inputs` and `state`; `run` fills the same rows of `outputs` and `state_out`, which the next
    call overwrites.

    Attributes:
        inputs: Each (max_rows, 1, *shape).
        outputs: Each (max_rows, 1, *shape), or (max_rows, *shape) without time.
        state, state_out: (max_rows, state_size) float32.
    """

    def __init__(self, runner: Runner, manifest: Manifest, max_rows: int) -> None:
        self.inputs = [np.zeros((max_rows, 1, *spec.shape), spec.numpy) for spec in manifest.inputs]
        self.outputs = [np.zeros((max_rows, *(1,) * spec.time, *spec.shape), spec.numpy) for spec in manifest.outputs]
        self.state = np.zeros((max_rows, manifest.state_size), np.float32)
        self.state_out = np.zeros_like(self.state)
        self._runner = runner
        self._calls: dict[int, BoundCall] = {}

    def run(self, rows: int) -> None:
        call = self._calls.get(rows)
        if call is None:
            call = self._calls[rows] = self._runner.bind(
                [TensorRef.of(array[:rows]) for array in (*self.inputs, self.state)],
                np.ones(rows, np.int32),
                [TensorRef.of(array[:rows]) for array in (*self.outputs, self.state_out)],
            )
        call.run()
