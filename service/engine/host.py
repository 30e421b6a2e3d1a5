"""The engine with its rows in host memory; the graph runs wherever the runner's session runs."""

import numpy as np
import structlog

from bundle import Manifest
from service.core.errors import EngineFailed, NonFiniteOutput, UnrollError
from service.engine.base import PlainRows, Rows, Tensors
from service.engine.runner import Runner, StepBuffers
from service.state.arena import HostArena
from service.state.slots import INITIAL

#: Rows of a call on bound memory. For more, what passing arrays costs does not count.
_BOUND_ROWS = 256

_log = structlog.get_logger(__name__)


class HostEngine:
    """`rows`: rows of the arena, the initial and the scratch row included."""

    def __init__(self, runner: Runner, manifest: Manifest, rows: int) -> None:
        self._runner = runner
        self._name = f"{manifest.name}:{manifest.version}"
        self._manifest = manifest
        self._buffers = StepBuffers(runner, manifest, _BOUND_ROWS)
        self._arena = HostArena(rows, manifest.state_size)
        self._arena.write(INITIAL, manifest.initial_row())
        self.read = self._arena.read
        self.write = self._arena.write
        self.copy = self._arena.copy

    def run(self, rows: Rows) -> tuple[Tensors, dict[int, UnrollError]]:
        try:
            return self._run(rows)
        except Exception as error:
            if len(rows.lens) > 1:  # find the row that cannot be run; the others must not suffer for it
                return self._run_one_by_one(rows)
            _log.error("the model failed", model=self._name, steps=rows.lens[0], exc_info=error)
            failure = EngineFailed("the model could not be run on this input; the server's log says why")
            return self._no_outputs(1, rows.lens[0]), {0: failure}

    def _run(self, rows: Rows) -> tuple[Tensors, dict[int, UnrollError]]:
        if max(rows.lens) == 1 and len(rows.lens) <= _BOUND_ROWS:
            outputs, state_out = self._run_steps(rows)
        else:
            inputs = {spec.name: array for spec, array in zip(self._manifest.inputs, rows.inputs, strict=True)}
            state, lens = self._arena.gather(rows.sources), np.array(rows.lens, np.int32)
            by_name, state_out = self._runner(inputs, state, lens)
            outputs = tuple(by_name[spec.name] for spec in self._manifest.outputs)
        if all(np.isfinite(array).all() for array in (state_out, *outputs)):
            self._arena.scatter(rows.targets, state_out)
            return outputs, {}
        failed: dict[int, UnrollError] = {
            i: NonFiniteOutput("the model's answer to this input is not finite")
            for i, steps in enumerate(rows.lens)
            if not (np.isfinite(state_out[i]).all() and all(map(_finite, self._row(outputs, i, steps))))
        }
        good = [i for i in range(len(rows.lens)) if i not in failed]
        self._arena.scatter([rows.targets[i] for i in good], state_out[good])
        return outputs, failed

    def _run_steps(self, rows: Rows) -> tuple[Tensors, np.ndarray]:
        """Single steps; returns outputs and new states, the latter in memory that the next call overwrites."""
        buffers, count = self._buffers, len(rows.lens)
        for bound, array in zip(buffers.inputs, rows.inputs, strict=True):
            bound[:count] = array
        self._arena.gather(rows.sources, out=buffers.state[:count])
        buffers.run(count)
        return tuple([array[:count].copy() for array in buffers.outputs]), buffers.state_out[:count]

    def _run_one_by_one(self, rows: Rows) -> tuple[Tensors, dict[int, UnrollError]]:
        together = self._no_outputs(len(rows.lens), max(rows.lens))
        failed: dict[int, UnrollError] = {}
        for i, steps in enumerate(rows.lens):
            inputs = tuple(array[i : i + 1, :steps] for array in rows.inputs)
            outputs, failure = self.run(PlainRows(inputs, [steps], [rows.sources[i]], [rows.targets[i]]))
            for target, source in zip(self._row(together, i, steps), self._row(outputs, 0, steps), strict=True):
                target[...] = source
            if failure:
                failed[i] = failure[0]
        return together, failed

    def _row(self, outputs: Tensors, row: int, steps: int) -> Tensors:
        """Views of one row's outputs, without the padding."""
        return tuple(
            array[row, :steps] if spec.time else array[row, ...]
            for spec, array in zip(self._manifest.outputs, outputs, strict=True)
        )

    def _no_outputs(self, rows: int, steps: int) -> Tensors:
        return tuple(
            np.zeros((rows, *(steps,) * spec.time, *spec.shape), spec.numpy) for spec in self._manifest.outputs
        )


def _finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())
