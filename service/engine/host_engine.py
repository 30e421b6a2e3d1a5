"""The engine that keeps the state rows in host memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from unroll.bundle import Manifest
from unroll.service.core.errors import UnrollError
from unroll.service.engine.engine import BatchResult, Rows, Tensors
from unroll.service.engine.rows import all_finite, non_finite, one_by_one
from unroll.service.engine.runner import Runner
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
        call = self._buffers.call(len(rows.lens))
        for bound, array in zip(call.inputs, rows.inputs, strict=True):
            bound[...] = array
        self.read_rows(rows.sources, out=call.state)
        call.run()
        return tuple([array.copy() for array in call.outputs]), call.state_out


@dataclass(frozen=True, slots=True)
class StepCall:
    """Single steps of some rows, on bound memory: fill `inputs` and `state`; `run` fills `outputs` and `state_out`.

    Attributes:
        inputs: Each (rows, 1, *shape).
        outputs: Each (rows, 1, *shape), or (rows, *shape) without time.
        state, state_out: (rows, state_size) float32.
    """

    inputs: list[np.ndarray]
    state: np.ndarray
    outputs: list[np.ndarray]
    state_out: np.ndarray
    run: Callable[[], None]


class StepBuffers:
    """Calls of up to `max_rows` rows, all on the same memory."""

    def __init__(self, runner: Runner, manifest: Manifest, max_rows: int) -> None:
        self._inputs = [np.zeros((max_rows, 1, *spec.shape), spec.numpy) for spec in manifest.inputs]
        self._outputs = [np.zeros((max_rows, *(1,) * spec.time, *spec.shape), spec.numpy) for spec in manifest.outputs]
        self._state = np.zeros((max_rows, manifest.state_size), np.float32)
        self._state_out = np.zeros_like(self._state)
        self._runner = runner
        self._calls: dict[int, StepCall] = {}

    def call(self, rows: int) -> StepCall:
        call = self._calls.get(rows)
        if call is None:
            inputs, outputs = [array[:rows] for array in self._inputs], [array[:rows] for array in self._outputs]
            state, state_out = self._state[:rows], self._state_out[:rows]
            bound = self._runner.bind(
                [TensorRef.of(array) for array in (*inputs, state)],
                np.ones(rows, np.int32),
                [TensorRef.of(array) for array in (*outputs, state_out)],
            )
            call = self._calls[rows] = StepCall(inputs, state, outputs, state_out, bound.run)
        return call
