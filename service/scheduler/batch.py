"""One call of the model."""

import itertools
import operator
from collections.abc import Sequence
from typing import Self

import numpy as np

from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.chunk import Chunk, Group
from unroll.service.scheduler.limits import ModelTraits

#: Rows of the arena. Passing the same object as sources and targets means that the batch updates rows in place.
Indices = list[int] | np.ndarray


class Batch:
    """A batch under construction: `add` its work, then `seal` it.

    Attributes:
        work: Chunks (one row each) and groups, in row order.
        lens: Steps per row.
        sources, targets: Arena rows that each row reads its state from and writes its new state to.
        uploads: States to write to arena rows before the batch runs.
        readback: Chunks whose final state is read from their workspace afterwards.
        rows, steps, longest: Number of rows, total steps, and steps of the longest row.
        waited: Total waiting time of all work, in seconds.
    """

    def __init__(self) -> None:
        self.work: list[Chunk | Group] = []
        self.uploads: list[tuple[int, np.ndarray]] = []
        self.readback: list[Chunk] = []
        self.lens: list[int] = []
        self.rows = self.steps = self.longest = 0
        self.waited = 0.0
        self._sources: list[Indices] = []
        self._targets: list[Indices] = []
        self._blocks: list[Tensors] = []

    def add(self, work: Chunk | Group, block: Tensors, length: int, sources: Indices, targets: Indices) -> None:
        """Add the rows of one piece of work.

        Args:
            block: The inputs, each (rows, length, *shape).
            length: Steps per row.
        """
        rows = len(targets)
        self.work.append(work)
        self.lens += [length] * rows
        self.rows += rows
        self.steps += length * rows
        self.longest = max(self.longest, length)
        self._sources.append(sources)
        self._targets.append(targets)
        self._blocks.append(block)

    def outputs_of(self, rows: int | slice, steps: int, outputs: Tensors, traits: ModelTraits) -> Tensors:
        """The batch's `outputs` of one row or of adjacent rows of `steps` steps each, without padding."""
        if steps == self.longest:
            return tuple([array[rows, ...] for array in outputs])
        return tuple(
            [
                np.ascontiguousarray(array[rows, :steps]) if spec.time else array[rows, ...]
                for spec, array in zip(traits.outputs, outputs, strict=True)
            ]
        )

    def seal(self, now: float) -> Self:
        """Build the arrays; the batch can then run."""
        for work in self.work:
            self.waited += (now - work.ready_at) * (len(work.sessions) if isinstance(work, Group) else 1)
        self.inputs = tuple([_padded(blocks, self.rows, self.longest) for blocks in zip(*self._blocks, strict=True)])
        self.targets = _indices(self._targets, self.rows)
        same = all(map(operator.is_, self._sources, self._targets))
        self.sources = self.targets if same else _indices(self._sources, self.rows)
        return self


def row_of(tensors: Tensors, row: int) -> Tensors:
    """Views of one row, without the batch axis. The result is an array even when it has no dimensions left."""
    return tuple([array[row, ...] for array in tensors])


def _indices(parts: list[Indices], count: int) -> np.ndarray:
    if len(parts) == 1:
        return np.asarray(parts[0], np.intp)
    return np.fromiter(itertools.chain.from_iterable(parts), np.intp, count)


def _padded(blocks: Sequence[np.ndarray], rows: int, longest: int) -> np.ndarray:
    """Concatenate blocks, each (rows, steps, *shape), into (rows, longest, *shape), padding with zeros."""
    if len(blocks) == 1:
        return np.ascontiguousarray(blocks[0])
    if all(block.shape[1] == longest for block in blocks):
        return np.concatenate(blocks)
    padded = np.zeros((rows, longest, *blocks[0].shape[2:]), blocks[0].dtype)
    end = 0
    for block in blocks:
        begin, end = end, end + len(block)
        padded[begin:end, : block.shape[1]] = block
    return padded
