"""Groups: the steps of many sessions from one frame are queued, run and answered as a unit.

Sessions that step together repeatedly become a cohort, which avoids all per-session work.
"""

from collections.abc import Callable, Sequence

import numpy as np

from unroll.service.core.errors import UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.batch import row_of
from unroll.service.scheduler.chunk import Group, GroupReply
from unroll.service.scheduler.completion import Completion
from unroll.service.scheduler.reply import Reply
from unroll.service.scheduler.session import OPEN, Cohort, Session


class Groups:
    def __init__(self, completion: Completion) -> None:
        """Uses the same components as the completion of chunks."""
        self._completion = completion
        self._admission, self._lanes, self._queues = completion.admission, completion.lanes, completion.queues
        self._sessions, self._replay, self._counters = completion.sessions, completion.replay, completion.counters

    def submit(
        self,
        sessions: Sequence[Session],
        positions: Sequence[int | None],
        inputs: Tensors,
        now: float,
        deadline: float,
        then: Callable[[GroupReply], None],
        *,
        again: bool = False,
    ) -> list[int]:
        """Queue the next steps of each session that is idle and at the specified position.

        Args:
            sessions: One per row.
            positions: The position that the client specified for each row, or None.
            inputs: Each (len(sessions), time, *shape).
            deadline: The time by which the steps must start.
            then: Called with the replies of all rows, or once per `max_batch` rows.
            again: The sessions are expected to step together again. The reply then has a cohort if they can form one.

        Returns:
            The rejected rows: their session is busy, closed, at another position, durable, or has an earlier row.
            Submit these steps with `Scheduler.submit`, which accepts them or explains why not.

        Raises:
            QueueFull, DeadlineUnreachable: Nothing was queued.
        """
        steps = inputs[0].shape[1]
        if self._lanes.is_long(steps):
            return list(range(len(sessions)))
        self._sessions.expire(now)
        self._admission.check(now, deadline, sessions[0].owner)
        most = self._lanes.most_rows(steps)
        detach = self._sessions.cohorts.detach
        rejected: list[int] = []
        rows: list[int] = []
        group = Group([], rows, inputs, steps, deadline, then, again=again)
        for row, (session, position) in enumerate(zip(sessions, positions, strict=True)):
            progress = session.progress or detach(session)
            at = progress.position
            if (
                progress.active is not None
                or session.life is not OPEN
                or (position != at and position is not None)
                or session.durable is not None
            ):
                rejected.append(row)
                continue
            if len(rows) == most:
                self._queue(group, now)
                rows = []
                group = Group([], rows, inputs, steps, deadline, then, again=again)
            progress.active = group
            progress.expected = at + steps
            group.sessions.append(session)
            rows.append(row)
        if rows:
            self._queue(group, now)
        return rejected

    def submit_cohorts(
        self,
        cohorts: Sequence[Cohort],
        positions: np.ndarray | None,
        inputs: Tensors,
        now: float,
        deadline: float,
        then: Callable[[GroupReply], None],
    ) -> bool:
        """Queue the next step of every session of the cohorts, all or nothing.

        Args:
            cohorts: In row order.
            positions: The positions that the client specified, or None.
            inputs: Each (sessions of all cohorts, 1, *shape).
            deadline: The time by which the steps must start.
            then: Called with the replies, once per cohort.

        Returns:
            False if nothing was queued because a cohort is dissolved, busy, or at another position; use `submit`.

        Raises:
            QueueFull, DeadlineUnreachable: Nothing was queued.
        """
        self._sessions.expire(now)
        parts, end = [], 0
        for cohort in cohorts:
            part = slice(end, end := end + len(cohort.sessions))
            in_place = positions is None or np.array_equal(positions[part], cohort.positions)
            if not in_place or not cohort.formed or cohort.active is not None:
                return False
            parts.append(part)
        self._admission.check(now, deadline, cohorts[0].sessions[0].owner)
        for cohort, part in zip(cohorts, parts, strict=True):
            own = tuple([array[part] for array in inputs])
            cohort.active = group = Group(cohort.sessions, part, own, 1, deadline, then, cohort=cohort, again=True)
            self._queue(group, now)
        return True

    def take_in(self, group: Group, outputs: Tensors, errors: dict[int, UnrollError], now: float) -> None:
        """Record that a batch ran the group. outputs, errors: as for `complete`."""
        count = len(group.sessions)
        self._admission.waiting_steps -= count * group.length
        if group.is_durable and len(errors) < count:
            self._completion.commits.append((group, outputs, errors))
        else:
            self.complete(group, outputs, errors, now)

    def complete(self, group: Group, outputs: Tensors, errors: dict[int, UnrollError], now: float) -> None:
        """Apply and answer a group that has run and, if its sessions are durable, is in the store.

        Args:
            outputs: Each (len(group.sessions), ...).
            errors: By row of the group. These rows are not applied.
        """
        count = len(group.sessions)
        self._admission.in_flight -= count
        self._counters.chunks += count - len(errors)
        self._counters.steps += (count - len(errors)) * group.length
        cohort, kept = group.cohort, True
        if cohort is not None and cohort.formed and not errors:
            cohort.last = group.inputs, outputs
            self._sessions.cohorts.step(cohort, now)
            positions = cohort.positions
        else:
            if cohort is not None and len(errors) < count:
                self._sessions.cohorts.detach(group.sessions[0])  # also writes the previous step
                self._replay.write_steps(cohort.slots, group.inputs, outputs, errors)
            positions, kept = self._apply(group, outputs, errors)
            cohort = self._rest(group, errors, now)
        group.answer(GroupReply(group.rows, positions, outputs, errors, cohort, kept))
        for row, follower in group.followers:
            follower.answer(errors.get(row) or Reply(row_of(outputs, row), int(positions[row])).copy())

    def fail(self, group: Group, error: UnrollError, now: float) -> None:
        self._admission.waiting_steps -= len(group.sessions) * group.length
        self.complete(group, (), dict.fromkeys(range(len(group.sessions)), error), now)

    def _queue(self, group: Group, now: float) -> None:
        if isinstance(group.rows, list) and len(group.rows) < len(group.inputs[0]):
            group.inputs = tuple(array[group.rows] for array in group.inputs)
        self._admission.in_flight += len(group.sessions)
        self._admission.waiting_steps += len(group.sessions) * group.length
        self._lanes.put(group, now)

    def _apply(self, group: Group, outputs: Tensors, errors: dict[int, UnrollError]) -> tuple[np.ndarray, bool]:
        """Advance each session on its own. Returns the new positions, uint64, and whether all replies were kept."""
        steps, detach, kept = group.length, self._sessions.cohorts.detach, True
        positions = []
        for row, session in enumerate(group.sessions):
            progress = session.progress or detach(session)
            if row not in errors:
                start = progress.position
                progress.position = start + steps
                if steps > 1 or session.applied is not None:
                    session.source = session.slot
                    if steps > 1 or not self._replay.remember_step(session):
                        kept &= self._replay.remember(session, start, group.inputs_of(row), row_of(outputs, row))
            positions.append(progress.position)
        return np.array(positions, np.uint64), kept

    def _rest(self, group: Group, errors: dict[int, UnrollError], now: float) -> Cohort | None:
        """Make the sessions idle or activate their next work. Returns the cohort that they form, if any."""
        if group.followed:
            for session in group.sessions:
                self._queues.advance(session, now)
        else:
            self._sessions.rest(group.sessions, now)
        for row, error in errors.items():
            session = group.sessions[row]
            self._counters.count_failed(error)
            if session in group.opened:
                self._completion.close_unused(session, now)
            self._completion.renumber(session, now)
        if group.ending:
            failed = {group.sessions[row] for row in errors}
            for session in group.ending - failed:
                if session.life is OPEN:
                    self._completion.close(session, now)
        if group.again and not group.followed:
            return self._sessions.cohorts.form(group.sessions, now)
        return None
