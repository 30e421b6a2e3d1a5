"""Joined steps: single steps that arrive one by one form a group, which the next batch takes.

Steps join only while nothing else is waiting; otherwise they are submitted as chunks. Until the batch is formed, a step
can leave the group without a trace.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from unroll.service.core.errors import Cancelled, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.chunk import Group, GroupReply
from unroll.service.scheduler.completion import Completion
from unroll.service.scheduler.limits import ModelTraits
from unroll.service.scheduler.session import OPEN, Owner, Session

#: Per input: bytes per row, dtype, and the shape of all rows.
Layout = Sequence[tuple[int, np.dtype, tuple[int, ...]]]

_NO_POSITIONS = np.zeros(0, np.uint64)
#: A group has the deadline of its first step. Later steps may join only in the first tenth of the time until then.
_SHARE = 10


class StepForm(Protocol):
    """Validates and answers the joined steps of a model. Listeners are opaque to everything else."""

    def faults(self, inputs: Tensors) -> dict[int, UnrollError]:
        """Errors of rows with invalid values. inputs: each (rows, 1, *shape)."""
        ...

    def answer(self, listeners: Sequence[Any], reply: GroupReply) -> None:
        """Answer each row. Must not raise."""
        ...


class OpenGroup(Group):
    """A group that accepts steps until a batch is formed.

    values: each row's inputs, concatenated. `JoinedSteps.close` decodes them into `inputs`.
    """

    __slots__ = ("_layout", "form", "listeners", "values")

    def __init__(self, layout: Layout, deadline: float, form: StepForm) -> None:
        self._layout = layout
        self.form = form
        self.values: list[bytes] = []
        self.listeners: list[Any] = []
        super().__init__([], slice(0), (), 1, deadline, partial(form.answer, self.listeners))

    @property
    def owners(self) -> set[Owner]:
        return {session.owner for session in self.sessions}

    def inputs_of(self, row: int) -> Tensors:
        return tuple([array[0] for array in self.read(self.values[row : row + 1])])

    def read(self, values: Sequence[bytes]) -> Tensors:
        """Decode rows of `values` into inputs, each (rows, 1, *shape)."""
        block = np.frombuffer(b"".join(values), np.uint8).reshape(-1, sum([size for size, _, _ in self._layout]))
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
        self._admission, self._lanes, self._queues = completion.admission, completion.lanes, completion.queues
        self._sessions, self._counters = completion.sessions, completion.counters
        self.group: OpenGroup | None = None
        self._room = self._most  # rows left for the group, after the work already waiting for the same batch

    def join(
        self,
        session: Session,
        position: int | None,
        step: bytes,
        now: float,
        deadline: float,
        form: StepForm,
        listener: Any,
    ) -> bool:
        """Queue the next step of a session.

        Args:
            position: The position that the client specified, or None.
            step: The step's inputs, concatenated, of the right length.
            deadline: The time by which the step must start; not earlier than that of any step that joined before.
            form: The model's form.
            listener: Passed to `form.answer`.

        Returns:
            False if nothing was changed, and the step must be submitted as a chunk.
        """
        progress = session.progress
        if (
            progress is None
            or progress.active is not None
            or (position is not None and position != progress.position)
            or session.applied is not None
        ):
            return False
        group, durable = self.group, session.durable
        if durable is not None and durable.stale:
            return False
        if group is None:
            self._room = self._most
            if not self._lanes.idle:
                self._room -= self._admission.in_flight
                if self._room <= 0 or not self._lanes.steps_may_join:
                    return False
            self._sessions.expire(now)
            group = OpenGroup(self._layout, deadline, form)
            group.is_durable = durable is not None
        elif (
            group.is_durable is (durable is None)
            or type(group.form) is not type(form)
            or (now - group.ready_at) * _SHARE > deadline - now
        ):
            return False
        if session.life is not OPEN or len(group.sessions) >= self._room or not self._admission.take(1, now, deadline):
            return False
        progress.active = group
        progress.expected = progress.position + 1
        group.sessions.append(session)
        group.values.append(step)
        group.listeners.append(listener)
        if self.group is None:
            self.group = group
            self._lanes.put(group, now)  # not earlier: a fair queue needs the group's owner
        return True

    def close(self, now: float) -> None:
        """Close the group for the next batch. Steps with invalid values fail."""
        group, self.group = self.group, None
        if group is None:
            return
        if group.sessions:
            group.inputs = group.read(group.values)
            if faults := group.form.faults(group.inputs):
                for row in sorted(faults, reverse=True):
                    self._fail(group, row, faults[row], now)
                group.inputs = group.read(group.values)
        if not group.sessions:
            group.outcome = GroupReply(slice(0), _NO_POSITIONS, (), {})

    def cancel(self, session: Session, listener: Any, now: float) -> None:
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
            if faults := group.form.faults(group.read(group.values[row : row + 1])):
                self._fail(group, row, faults[0], now)

    def refuse(self, session: Session, error: UnrollError, now: float) -> None:
        """Fail the session's waiting step, if there is one."""
        group = self.group
        if group is not None and session in group.sessions:
            self._counters.count_failed(error)
            self._fail(group, group.sessions.index(session), error, now)

    def _fail(self, group: OpenGroup, row: int, error: UnrollError, now: float) -> None:
        retries = [follower for followed, follower in group.followers if followed == row]
        listener = self._remove(group, row, now)
        group.form.answer([listener], GroupReply(slice(1), _NO_POSITIONS, (), {0: error}))
        for follower in retries:
            follower.answer(error)

    def _remove(self, group: OpenGroup, row: int, now: float) -> Any:
        """Remove a row. Returns its listener."""
        session, _ = group.sessions.pop(row), group.values.pop(row)
        group.followers = [(each - (each > row), follower) for each, follower in group.followers if each != row]
        self._admission.in_flight -= 1
        self._admission.waiting_steps -= 1
        progress = session.own_progress
        if progress.pending is None and session.life is OPEN:
            progress.active = None  # not `rest`, which would count as use
        else:
            self._queues.advance(session, now)
        self._completion.renumber(session, now)
        return group.listeners.pop(row)
