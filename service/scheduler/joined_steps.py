"""Joined steps: single steps that arrive one by one form a group, which the next batch takes.

Steps join only while nothing but single steps and long chunks is waiting; otherwise they are submitted as chunks. Until
the batch is formed, a step can leave the group without a trace.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from unroll.service.core.errors import Cancelled, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.chunk import Chunk, Group, GroupReply
from unroll.service.scheduler.completion import Completion
from unroll.service.scheduler.limits import ModelTraits
from unroll.service.scheduler.reply import to_bytes
from unroll.service.scheduler.session import OPEN, Owner, Session

#: Per input: bytes per row, dtype, and the shape of all rows.
Layout = Sequence[tuple[int, np.dtype, tuple[int, ...]]]

_NO_POSITIONS = np.zeros(0, np.uint64)


class StepListener(Protocol):
    """Receives the outcome of a joined step. Its methods must not raise."""

    @property
    def write(self) -> Callable[[Tensors], Sequence[Any]]:
        """Encodes a group's outputs, one element per row. Called once for all listeners with the same function."""

    def complete(self, written: Any, position: int) -> None:
        """The step ran. written: the row's element from `write`. position: The session's, after the step."""

    def fail(self, error: UnrollError) -> None: ...


class OpenGroup(Group):
    """A group that accepts steps until a batch is formed.

    values: each row's inputs, concatenated. `JoinedSteps.close` decodes them into `inputs`. deadlines: each row's;
    `deadline` is the earliest.
    """

    __slots__ = ("_layout", "deadlines", "listeners", "values")
    opened: set[Session]
    ending: set[Session]

    def __init__(self, layout: Layout, deadline: float) -> None:
        self._layout = layout
        self.values: list[bytes] = []
        self.deadlines: list[float] = []
        self.listeners: list[StepListener] = []
        super().__init__([], slice(0), (), 1, deadline, partial(_answer, self.listeners), opened=set(), ending=set())

    @property
    def owners(self) -> set[Owner]:
        return {session.owner for session in self.sessions}

    def inputs_of(self, row: int) -> Tensors:
        return tuple([array[0] for array in self.read(self.values[row : row + 1])])

    def read(self, values: Sequence[bytes]) -> Tensors:
        """Decode rows of `values` into inputs, each (rows, 1, *shape)."""
        content = b"".join(values)
        if len(self._layout) == 1:
            _, dtype, shape = self._layout[0]
            return (np.frombuffer(content, dtype).reshape(shape),)
        block = np.frombuffer(content, np.uint8).reshape(len(values), -1)
        end, arrays = 0, []
        for size, dtype, shape in self._layout:
            begin, end = end, end + size
            arrays.append(np.frombuffer(block[:, begin:end].tobytes(), dtype).reshape(shape))
        return tuple(arrays)


class JoinedSteps:
    """Owns the open group, if there is one."""

    def __init__(self, traits: ModelTraits, completion: Completion) -> None:
        self._layout = [(spec.nbytes, spec.numpy, (-1, 1, *spec.shape)) for spec in traits.inputs]
        self._most = completion.lanes.most_rows(1)
        self._completion = completion
        self._faults = traits.faults
        self._admission, self._lanes, self._queues = completion.admission, completion.lanes, completion.queues
        self._sessions, self._replay, self._counters = completion.sessions, completion.replay, completion.counters
        self.group: OpenGroup | None = None
        self._room = self._most  # rows left for the group, after the work already waiting for the same batch

    @property
    def takes_more(self) -> bool:
        """Whether a step of a memory session can probably join."""
        group = self.group
        return self._lanes.idle if group is None else not group.is_durable and len(group.sessions) < self._room

    def join(
        self,
        session: Session,
        position: int | None,
        step: bytes,
        now: float,
        deadline: float,
        listener: StepListener,
        *,
        opens: bool = False,
        ends: bool = False,
    ) -> bool:
        """Queue the next step of a session.

        Args:
            position: The position that the client specified, or None.
            step: The step's inputs, concatenated, of the right length.
            deadline: The time by which the step must start.
            opens: The session was opened for this step, and is closed again if the step fails.
            ends: The step closes its session, and is never retried.

        Returns:
            False if nothing was changed, and the step must be submitted as a chunk.
        """
        progress = session.progress
        if (
            progress is None
            or progress.active is not None
            or (position is not None and position != progress.position)
            or (session.applied is not None and not self._replay.has_row(session))
        ):
            return False
        group, durable = self.group, session.durable
        if durable is not None and (durable.stale or not durable.token or opens or ends):
            return False
        if group is None:
            self._room = self._most
            if not self._lanes.idle:
                self._room -= self._admission.in_flight
                if self._room <= 0 or not self._lanes.steps_may_join:
                    return False
            self._sessions.expire(now)
            group = OpenGroup(self._layout, deadline)
            group.is_durable = durable is not None
        elif group.is_durable is (durable is None):
            return False
        if session.life is not OPEN or len(group.sessions) >= self._room or not self._admission.take(1, now, deadline):
            return False
        progress.active = group
        progress.expected = progress.position + 1
        group.sessions.append(session)
        group.values.append(step)
        group.deadlines.append(deadline)
        if deadline < group.deadline:
            group.deadline = deadline
        group.listeners.append(listener)
        if opens:
            group.opened.add(session)
        if ends:
            group.ending.add(session)
        if self.group is None:
            self.group = group
            self._lanes.put(group, now)  # not earlier: a fair queue needs the group's owner
        return True

    def join_chunk(self, chunk: Chunk, session: Session, now: float, listener: StepListener) -> bool:
        """Queue a chunk of one step of this session, see `join`."""
        if chunk.final and chunk.pinned:  # its reply is kept for retries
            return False
        position, opens = chunk.start if chunk.pinned else None, chunk.opening is not None
        step, deadline = to_bytes(chunk.inputs), chunk.deadline
        return self.join(session, position, step, now, deadline, listener, opens=opens, ends=chunk.final)

    def close(self, now: float) -> None:
        """Close the group for the next batch. Steps with invalid values fail."""
        group, self.group = self.group, None
        if group is not None:
            self._make_inputs(group)
            if group.sessions and (faults := self._faults(group.inputs)):
                self._drop(group, faults, now)

    def end_late(self, group: OpenGroup, error: UnrollError, now: float) -> None:
        """Fail the rows of a closed group whose deadline has passed, before a batch takes the group."""
        late = {row: error for row, deadline in enumerate(group.deadlines) if now >= deadline}
        for _ in late:
            self._counters.count_failed(error)
        self._drop(group, late, now)
        group.deadline = min(group.deadlines, default=now)

    def cancel(self, session: Session, listener: StepListener, now: float) -> None:
        """Remove the step of a client that disconnected, unless a batch has taken it or a retry also waits for it."""
        group = self.group
        if group is None or session not in group.sessions:
            return
        row = group.sessions.index(session)
        if group.listeners[row] is listener and all(row != followed for followed, _ in group.followers):
            self._counters.count_failed(Cancelled("the client disconnected"))
            self._remove(group, row, now)

    def check(self, session: Session, now: float) -> None:
        """Fail the session's waiting step now if its values are invalid, so that it does not occupy a position."""
        group = self.group
        if group is not None and session in group.sessions:
            row = group.sessions.index(session)
            if faults := self._faults(group.read(group.values[row : row + 1])):
                self._fail(group, row, faults[0], now)

    def refuse(self, session: Session, error: UnrollError, now: float) -> None:
        """Fail the session's waiting step, if there is one."""
        group = self.group
        if group is not None and session in group.sessions:
            self._counters.count_failed(error)
            self._fail(group, group.sessions.index(session), error, now)

    def _drop(self, group: OpenGroup, errors: Mapping[int, UnrollError], now: float) -> None:
        for row in sorted(errors, reverse=True):
            self._fail(group, row, errors[row], now)
        self._make_inputs(group)

    def _make_inputs(self, group: OpenGroup) -> None:
        if group.sessions:
            group.inputs = group.read(group.values)
        else:
            group.outcome = GroupReply(slice(0), _NO_POSITIONS, (), {})

    def _fail(self, group: OpenGroup, row: int, error: UnrollError, now: float) -> None:
        retries = [follower for followed, follower in group.followers if followed == row]
        self._remove(group, row, now).fail(error)
        for follower in retries:
            follower.answer(error)

    def _remove(self, group: OpenGroup, row: int, now: float) -> StepListener:
        session = group.sessions.pop(row)
        del group.values[row], group.deadlines[row]
        group.followers = [(each - (each > row), follower) for each, follower in group.followers if each != row]
        self._admission.in_flight -= 1
        self._admission.waiting_steps -= 1
        group.ending.discard(session)
        progress = session.own_progress
        if progress.pending is None and session.life is OPEN:
            progress.active = None  # not `rest`, which would count as use
        else:
            self._queues.advance(session, now)
        if session in group.opened:
            self._completion.close_unused(session, now)
        self._completion.renumber(session, now)
        return group.listeners.pop(row)


def _answer(listeners: Sequence[StepListener], reply: GroupReply) -> None:
    positions, errors = reply.positions.tolist(), reply.errors
    written: dict[Callable[[Tensors], Sequence[Any]], Sequence[Any]] = {}
    for row, listener in enumerate(listeners):
        if row in errors:
            listener.fail(errors[row])
            continue
        rows = written.get(listener.write)
        if rows is None:
            rows = written[listener.write] = listener.write(reply.outputs)
        listener.complete(rows[row], positions[row])
