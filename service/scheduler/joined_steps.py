"""Joined steps: single steps of idle sessions wait one by one, and those that a batch takes run as one group.

Until then, a step can leave without a trace.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from unroll.service.core.errors import Cancelled
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.chunk import Group, GroupReply, Opening, Step, StepListener
from unroll.service.scheduler.completion import Completion
from unroll.service.scheduler.limits import ModelTraits
from unroll.service.scheduler.session import OPEN, Session


class JoinedSteps:
    """Queues single steps, and makes groups of them."""

    def __init__(self, traits: ModelTraits, completion: Completion) -> None:
        #: Per input: bytes per row, dtype, and the shape of all rows.
        self._layout = [(spec.nbytes, spec.numpy, (-1, 1, *spec.shape)) for spec in traits.inputs]
        self._completion = completion
        self._faults = traits.faults
        self._admission, self._lanes = completion.admission, completion.lanes
        self._sessions, self._replay = completion.sessions, completion.replay

    def open(self, session_id: str, now: float, deadline: float) -> Session | None:
        """Open a session whose first step joins next; None if that would evict another, or the step could not join."""
        fits = self._sessions.slots.has_free and self._replay.has_table and self._admission.has_room(now, deadline)
        if not fits:
            return None
        self._completion.counters.opened += 1
        return self._sessions.open(session_id, now)

    def join(
        self,
        session: Session,
        position: int | None,
        values: bytes,
        now: float,
        deadline: float,
        listener: StepListener,
        opening: Opening | None = None,
        *,
        ends: bool = False,
    ) -> bool:
        """Queue the next step of an idle session.

        Args:
            position: The position that the client specified, or None.
            values: The step's inputs, concatenated, of the right length.
            deadline: The time by which the step must start.
            opening: The session was opened for this step, and is closed again if the step fails.
            ends: The step closes its session, and is never retried.

        Returns:
            False if nothing was changed, and the step must be submitted as a chunk.
        """
        progress, durable = session.progress, session.durable
        if (
            progress is None
            or progress.active is not None
            or (position is not None and position != progress.position)
            or (session.applied is not None and not self._replay.has_row(session))
            or (durable is not None and (durable.stale or not durable.token or opening is not None or ends))
        ):
            return False
        if now - progress.last_used >= self._sessions.idle_timeout:
            self._sessions.expire(now)
        if session.life is not OPEN or not self._admission.take(1, now, deadline):
            return False
        step = progress.active = Step(session, values, now, deadline, listener, opening, ends)
        progress.expected = progress.position + 1
        self._lanes.put_step(step)
        return True

    def group(self, steps: list[Step], now: float) -> list[Group]:
        """Group the steps that a batch takes: all or none in a group are durable. Those with invalid values fail."""
        inputs = self._read(steps)
        for row, error in self._faults(inputs).items():
            self._completion.fail(steps[row], error, now)
        waiting = [step for step in steps if step.outcome is None]
        durable = [step for step in waiting if step.session.durable is not None]
        if not waiting:
            return []
        if len(waiting) < len(steps):
            return self.group(waiting, now)
        if durable and len(durable) < len(steps):
            return self.group([step for step in steps if step.session.durable is None], now) + self.group(durable, now)
        return [_group(steps, inputs, is_durable=bool(durable))]

    def cancel(self, session: Session, listener: StepListener, now: float) -> None:
        """Remove the step of a client that disconnected, unless a batch has taken it or a retry also waits for it."""
        step = _waiting_step(session)
        if step is not None and step.listener is listener and not step.followers:
            self._completion.fail(step, Cancelled("the client disconnected"), now)

    def check(self, session: Session, now: float) -> None:
        """Prepare the session's waiting step for a comparison; invalid, it fails, and does not occupy a position."""
        step = _waiting_step(session)
        if step is not None:
            inputs = self._read([step])
            step.inputs = tuple([array[0] for array in inputs])
            if faults := self._faults(inputs):
                self._completion.fail(step, faults[0], now)

    def _read(self, steps: Sequence[Step]) -> Tensors:
        """The inputs of the steps, each (steps, 1, *shape)."""
        content = b"".join([step.values for step in steps])
        if len(self._layout) == 1:
            _, dtype, shape = self._layout[0]
            return (np.frombuffer(content, dtype).reshape(shape),)
        block = np.frombuffer(content, np.uint8).reshape(len(steps), -1)
        end, arrays = 0, []
        for size, dtype, shape in self._layout:
            begin, end = end, end + size
            arrays.append(np.frombuffer(block[:, begin:end].tobytes(), dtype).reshape(shape))
        return tuple(arrays)


def _waiting_step(session: Session) -> Step | None:
    step = None if session.progress is None else session.progress.active
    return step if isinstance(step, Step) else None


def _group(steps: list[Step], inputs: Tensors, *, is_durable: bool) -> Group:
    sessions = [step.session for step in steps]
    listeners = [step.listener for step in steps]
    group = Group(sessions, slice(0), inputs, 1, math.inf, partial(_answer, listeners), is_durable=is_durable)
    group.ready_at = sum([step.ready_at for step in steps]) / len(steps)
    group.opened, group.ending = opened, ending = set[Session](), set[Session]()
    for row, step in enumerate(steps):
        progress = step.session.progress
        assert progress is not None  # a session with a step is not in a cohort
        progress.active = group
        if progress.pending is not None:
            group.followed = True
        if step.followers:
            group.followers += [(row, follower) for follower in step.followers]
        if step.opening is not None:
            opened.add(step.session)
        if step.final:
            ending.add(step.session)
    return group


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
