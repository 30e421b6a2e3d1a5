"""Lanes hold the ready work and form the next batch from it.

Each length class has a lane, so that the rows of a batch have similar lengths. Long chunks have a separate lane. The
lane whose head has waited longest goes first. If its work does not fit in one batch, the lane moves to the back, and
its owners take turns from then on. A long chunk runs in pieces and moves to the back after each piece ("cellular
batching": P. Gao et al., "Low latency RNN inference with cellular batching", EuroSys 2018).
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.admission import Pace
from unroll.service.scheduler.batch import Batch, Indices
from unroll.service.scheduler.chunk import Chunk, Group, Step
from unroll.service.scheduler.fair_queue import FairQueue
from unroll.service.scheduler.limits import ModelTraits, SchedulerLimits
from unroll.service.scheduler.rollout import Rollout
from unroll.service.scheduler.session import Owner
from unroll.service.state.slots import INITIAL, SCRATCH, Slots

_Lane = deque[Chunk | Group] | FairQueue[Chunk | Group]

#: Length class of the chunks that run in pieces.
_LONG = sys.maxsize
#: Interval between sweeps over all starved chunks; a sweep over thousands takes longer than a batch.
_SWEEP_SECONDS = 0.1


class Lanes:
    """Queues of ready work.

    Args:
        workspaces: Arena rows that hold the states of chunks between their pieces.
        drop: Whether this work has ended and must not run.
        group: The groups that run these steps.
    """

    def __init__(
        self,
        traits: ModelTraits,
        limits: SchedulerLimits,
        workspaces: Slots,
        pace: Pace,
        drop: Callable[[Chunk | Group, float], bool],
        group: Callable[[list[Step], float], list[Group]],
    ) -> None:
        self._traits = traits
        self._limits = limits
        self._workspaces = workspaces
        self._pace = pace
        self._drop = drop
        self._group = group
        self._longest = limits.piece_steps if traits.cuttable else sys.maxsize
        #: By length class, in the order of their turns. A lane becomes a fair queue once it exceeds one batch.
        self._lanes: dict[int, _Lane] = {}
        self._starved: FairQueue[Chunk] = FairQueue()  # chunks waiting for a free workspace
        self._sweep_at = 0.0  # time of the next sweep

    def __iter__(self) -> Iterator[Chunk | Group]:
        for lane in self._lanes.values():
            yield from lane
        yield from self._starved

    def owners(self) -> set[Owner]:
        found = self._starved.owners()
        for lane in self._lanes.values():
            found |= lane.owners() if isinstance(lane, FairQueue) else {work.owner for work in lane}
        return found

    @property
    def idle(self) -> bool:
        return not self._starved and not self._lanes

    def is_long(self, steps: int) -> bool:
        """Whether a chunk of this many steps runs in pieces."""
        return steps > self._longest

    def most_rows(self, steps: int) -> int:
        return min(self._limits.max_batch, max(1, self._limits.max_batch_steps // steps))

    def next_steps(self, work: Chunk | Group) -> int:
        """Approximately how many steps per row run next."""
        if isinstance(work, Rollout):
            return min(work.steps_ready, self._longest)
        if work.length <= self._longest or isinstance(work, Group):
            return work.length
        return min(work.length - work.done, self._longest)

    def put(self, work: Chunk | Group, now: float) -> None:
        work.ready_at = now
        length = self._length_class(self.next_steps(work) if isinstance(work, Rollout) else work.length)
        lane = self._lanes.get(length)
        if lane is None:
            lane = self._lanes[length] = deque()
        lane.append(work)

    def put_step(self, step: Step) -> None:
        """The same for a step that has its `ready_at`."""
        lane = self._lanes.get(1)
        if lane is None:
            lane = self._lanes[1] = deque()
        lane.append(step)

    def give_back_workspace(self, chunk: Chunk) -> None:
        """Free the chunk's workspace."""
        assert chunk.workspace is not None
        self._workspaces.give_back(chunk.workspace)
        chunk.pieces = None

    def take(self, now: float) -> Batch:
        """Form the next batch; it is empty if nothing is waiting."""
        self._feed_starved(now)
        while self._lanes:
            length, lane = next(iter(self._lanes.items()))
            batch = self._fill_long(lane, now) if length == _LONG else self._fill(lane, length, now)
            del self._lanes[length]
            if lane:
                self._lanes[length] = FairQueue(lane) if isinstance(lane, deque) else lane
            if batch.rows:
                return batch.seal(now)
        return Batch()

    def check_invariants(self) -> None:
        """Raises AssertionError if a workspace has no waiting chunk. Call it only while no batch is running."""
        waiting = [work for work in self if isinstance(work, Chunk) and work.outcome is None]
        assert len({chunk.workspace for chunk in waiting} - {None}) == self._workspaces.taken, "a workspace is lost"

    def _length_class(self, steps: int) -> int:
        """The maximum length to which a lane's rows are padded."""
        if steps > self._longest:
            return _LONG
        return 1 << (steps - 1).bit_length() if self._traits.ragged else steps

    def _fill(self, lane: _Lane, length: int, now: float) -> Batch:
        most = room = self.most_rows(length)
        batch = Batch()
        steps: list[Step] = []
        while lane:
            work = lane[0]
            if isinstance(work, Step):
                if not room:
                    break
                lane.popleft()
                if (work.outcome is None and now < work.deadline) or not self._drop(work, now):
                    steps.append(work)
                    room -= 1
                continue
            if work.row_count > room and room < most:
                break
            lane.popleft()
            if self._drop(work, now) or not self._has_room(work, batch):
                continue
            room -= work.row_count
            if isinstance(work, Group):
                batch.add(work, work.inputs, work.length, *_rows_of(work))
            elif isinstance(work, Rollout):
                ready = self.next_steps(work)
                _add_piece(batch, work, work.take_inputs(ready), ready)
            else:
                work.running = True
                _add(batch, work, work.inputs, work.length, *_begin_and_end(work))
        for group in self._group(steps, now) if steps else ():
            batch.add(group, group.inputs, 1, *_rows_of(group))
        return batch

    def _has_room(self, work: Chunk | Group, batch: Batch) -> bool:
        """Allocate a workspace if the work needs one, and upload its state. Without a free one, it starves."""
        if isinstance(work, Group) or not work.keeps_workspace:
            return True
        if work.workspace is None:
            work.workspace = self._workspaces.take()
            if work.workspace is None:
                self._starved.append(work)
                return False
            if work.state_row is not None:
                batch.uploads.append((work.workspace, work.state_row))
        if not isinstance(work, Rollout):
            batch.readback.append(work)
        return True

    def _fill_long(self, lane: _Lane, now: float) -> Batch:
        """One piece of each long chunk, none longer than the shortest remainder, so that nothing is padded."""
        batch = Batch()
        chunks: list[Chunk] = []
        while lane and len(chunks) < self._limits.max_batch:
            chunk = lane.popleft()
            assert isinstance(chunk, Chunk), "groups are short"
            if self._drop(chunk, now) or not self._has_room(chunk, batch):
                continue
            if chunk.workspace is None:
                chunk.workspace = self._workspaces.take()
            if chunk.workspace is None:
                self._starved.append(chunk)
            else:
                chunks.append(chunk)
        if chunks:
            remaining = min(chunk.length - chunk.done for chunk in chunks)
            steps = min(self._pace.piece(len(chunks), now), remaining)
            for chunk in chunks:
                end = chunk.done + steps
                _add_piece(batch, chunk, tuple([array[chunk.done : end] for array in chunk.inputs]), steps)
        return batch

    def _feed_starved(self, now: float) -> None:
        """Requeue as many starved chunks as there are free workspaces; periodically drop those that have ended."""
        if not self._starved:
            return
        if now >= self._sweep_at:
            self._sweep_at = now + _SWEEP_SECONDS
            remaining = [chunk for chunk in self._starved if not self._drop(chunk, now)]
            if len(remaining) < len(self._starved):
                self._starved = FairQueue(remaining)
        free = self._workspaces.count - self._workspaces.taken
        while self._starved and free > 0:
            chunk = self._starved.popleft()
            if not self._drop(chunk, now):
                self.put(chunk, now)
                free -= 1


def _add_piece(batch: Batch, chunk: Chunk, inputs: Tensors, steps: int) -> None:
    assert chunk.workspace is not None
    chunk.running = True
    end = chunk.done + steps
    begin, target = _begin_and_end(chunk)
    source = chunk.workspace if chunk.done else begin
    if end < chunk.length:
        target = chunk.workspace
    _add(batch, chunk, inputs, steps, source, target)


def _add(batch: Batch, chunk: Chunk, inputs: Tensors, steps: int, source: int, target: int) -> None:
    targets, block = [target], tuple([array[np.newaxis] for array in inputs])
    batch.add(chunk, block, steps, targets if source == target else [source], targets)


def _begin_and_end(chunk: Chunk) -> tuple[int, int]:
    if chunk.session is not None:
        return chunk.session.source, chunk.session.slot
    if chunk.state_row is not None and chunk.workspace is not None:
        return chunk.workspace, chunk.workspace
    return INITIAL, SCRATCH


def _rows_of(group: Group) -> tuple[Indices, Indices]:
    if group.cohort is not None:
        return group.cohort.slots, group.cohort.slots
    sources, targets = [session.source for session in group.sessions], [session.slot for session in group.sessions]
    return (targets if sources == targets else sources), targets
