"""The engine with its rows in host memory; the graph runs wherever the runner's session runs."""

from collections.abc import Sequence

import numpy as np
import structlog

from bundle import Manifest
from service.core.errors import EngineFailed, NonFiniteOutput, UnrollError
from service.engine.base import BatchRow, Tensors
from service.engine.runner import Runner
from service.state.arena import HostArena
from service.state.slots import INITIAL

_log = structlog.get_logger(__name__)


class HostEngine:
    """`rows`: rows of the arena, the initial and the scratch row included."""

    def __init__(self, runner: Runner, manifest: Manifest, rows: int) -> None:
        self._runner = runner
        self._name = f"{manifest.name}:{manifest.version}"
        self._inputs = manifest.inputs
        self._outputs = manifest.outputs
        self._arena = HostArena(rows, manifest.state_size)
        self._arena.write(INITIAL, manifest.initial_row())
        self.read = self._arena.read
        self.write = self._arena.write
        self.copy = self._arena.copy

    def run(self, batch: Sequence[BatchRow]) -> list[Tensors | UnrollError]:
        try:
            return self._run(batch)
        except Exception as error:
            if len(batch) > 1:  # find the row that cannot be run; the others must not suffer for it
                return [result for row in batch for result in self.run([row])]
            _log.error("the model failed", model=self._name, steps=batch[0].steps, exc_info=error)
            return [EngineFailed("the model could not be run on this input; the server's log says why")]

    def _run(self, batch: Sequence[BatchRow]) -> list[Tensors | UnrollError]:
        lens = np.array([row.steps for row in batch], np.int32)
        longest = int(lens.max())
        even = int(lens.min()) == longest
        inputs = {
            spec.name: _together([row.inputs[i] for row in batch], longest, even) for i, spec in enumerate(self._inputs)
        }
        state = self._arena.gather([row.source for row in batch])
        outputs, state_out = self._runner(inputs, state, lens)

        results: list[Tensors | UnrollError] = [
            tuple(
                (outputs[spec.name][i, : row.steps] if spec.time else outputs[spec.name][i]).copy()
                for spec in self._outputs
            )
            for i, row in enumerate(batch)
        ]
        targets = [row.target for row in batch]
        if not all(np.isfinite(array).all() for array in (state_out, *outputs.values())):
            good = [i for i, result in enumerate(results) if _finite(result) and np.isfinite(state_out[i]).all()]
            for i in set(range(len(batch))) - set(good):
                results[i] = NonFiniteOutput("the model's answer to this input is not finite")
            targets, state_out = [targets[i] for i in good], state_out[good]
        self._arena.scatter(targets, state_out)
        return results


def _finite(result: Tensors | UnrollError) -> bool:
    return isinstance(result, tuple) and all(np.isfinite(array).all() for array in result)


def _together(arrays: list[np.ndarray], longest: int, even: bool) -> np.ndarray:
    """Arrays (time_i, *shape) as one batch: (len(arrays), longest, *shape), short rows padded with zeros."""
    if even:
        return np.concatenate(arrays).reshape(len(arrays), longest, *arrays[0].shape[1:])
    batch = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), arrays[0].dtype)
    for i, array in enumerate(arrays):
        batch[i, : len(array)] = array
    return batch
