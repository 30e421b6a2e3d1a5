"""Cohorts change only the cost: any order of events gives the same results with and without them."""

import os

import hypothesis.strategies as st
import numpy as np
from fold import find
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from served import BAD, Served

from unroll.service.core.errors import (
    UnrollError,
)
from unroll.service.scheduler.session import Session

#: `make machine-test` runs more examples.
EXAMPLES = int(os.environ.get("UNROLL_TEST_EXAMPLES", "25"))

IDS = st.sampled_from("abcde")


class CohortMachine(RuleBasedStateMachine):
    """Apply the same events to two schedulers, one with cohorts and one without."""

    @initialize()
    def begin(self) -> None:
        self.one, self.other = Served(cohorts=True), Served(cohorts=False)
        self.now = 0.0
        self.ids: list[str] = []  # the sessions of the last frame
        for session_id in "abc":
            self.both(Served.open, session_id, 0.0)
        self.frames(value=1, turns=2, unsaid=True, answered=True)

    def both(self, do, *arguments: object) -> None:
        outcomes = []
        for served in (self.one, self.other):
            try:
                outcomes.append(do(served, *arguments))
            except UnrollError as error:
                outcomes.append((error.code, error.message, error.details))
        assert outcomes[0] == outcomes[1]

    def position(self, session_id: str, offset: int | None) -> int | None:
        session = self.other.bound.get(session_id)
        return None if session is None or offset is None else max(0, session.position + offset)

    @rule(session_id=IDS)
    def open(self, session_id: str) -> None:
        self.both(Served.open, session_id, self.now)

    @rule(value=st.integers(1, 3), turns=st.integers(2, 4), unsaid=st.booleans(), answered=st.booleans())
    def frames(self, value: int, turns: int, unsaid: bool, answered: bool) -> None:
        """Repeat a frame of the same sessions, the common case. The last one may still be queued."""
        ids = [session.id for session in self.other.scheduler.sessions]
        if self.one.batch.rows or not ids:
            return
        if set(ids) == set(self.ids):
            ids = self.ids
        self.ids = ids
        for turn in range(turns):
            positions = [self.position(i, None if unsaid else 0) for i in ids]
            self.both(Served.frame, ids, positions, [value] * len(ids), self.now)
            if answered or turn < turns - 1:
                self.both(Served.run, self.now)

    @rule(
        ids=st.just([]) | st.lists(IDS, min_size=1, max_size=5),
        data=st.data(),
        offset=st.sampled_from([None, 0, 0, -1, 1]),
    )
    def frame(self, ids: list[str], data: st.DataObject, offset: int | None) -> None:
        """Send a frame of any sessions in any order, or of the last frame's sessions."""
        ids = [i for i in ids or self.ids if i in self.other.bound]
        if ids:
            values = [data.draw(st.sampled_from([1, 2, 3, BAD])) for _ in ids]
            odd = data.draw(st.integers(0, 2 * len(ids)))  # the row with a wrong position, if any
            positions = [self.position(i, offset if row == odd or offset is None else 0) for row, i in enumerate(ids)]
            self.both(Served.frame, ids, positions, values, self.now)

    @rule(
        session_id=IDS,
        steps=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=2),
        offset=st.sampled_from([None, 0, -1, -1, -2, 1]),
        final=st.booleans(),
    )
    def step(self, session_id: str, steps: list[int], offset: int | None, final: bool) -> None:
        position = self.position(session_id, offset)
        self.both(Served.step, session_id, steps, position, final and offset == 0, self.now)

    @rule(value=st.integers(1, 3))
    def retry(self, value: int) -> None:
        """Retry every session's last step, with the same payload or another."""
        for session_id in self.ids:
            self.both(Served.step, session_id, [value], self.position(session_id, -1), False, self.now)

    @rule(session_id=IDS)
    def look(self, session_id: str) -> None:
        self.both(lambda served: repr(served.scheduler.sessions.find_detached(session_id, self.now)))

    @rule(session_id=IDS)
    def act(self, session_id: str) -> None:
        """Change the session's position, as restoring a snapshot does."""

        def act(served: Served) -> None:
            def jump(session: Session) -> None:
                session.own_progress.position += 7
                served.scheduler.replay.forget(session)

            served.scheduler.submit_action(find(served.scheduler, session_id, self.now), jump, self.now)

        self.both(act)

    @rule(session_id=IDS)
    def close(self, session_id: str) -> None:
        def close(served: Served) -> str:
            session = find(served.scheduler, session_id, self.now)
            served.scheduler.close(session, self.now)
            return repr(session)

        self.both(close)

    @rule(session_id=IDS, depth=st.sampled_from([1, 1, 2]))
    def remember(self, session_id: str, depth: int) -> None:
        def remember(served: Served) -> None:
            if session_id in served.scheduler.sessions:
                served.scheduler.set_retry_depth(served.bound[session_id], depth)

        self.both(remember)

    @rule()
    def cancel(self) -> None:
        if self.one.chunks:
            self.both(lambda served: served.scheduler.cancel(served.chunks.pop(), self.now))

    @rule(seconds=st.sampled_from([0.5, 20.0, 49.0, 60.0, 101.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.both(lambda served: served.scheduler.sessions.expire(self.now))

    @rule()
    def begin_batch(self) -> None:
        """Start a batch and leave it running during other events."""
        if not self.one.batch.rows:
            self.both(Served.begin, self.now)
            for name in ("lens", "sources", "targets", "inputs"):
                one, other = (getattr(served.batch, name, None) for served in (self.one, self.other))
                assert np.array_equal(one, other) if one is not None else other is None

    @rule()
    def end_batch(self) -> None:
        self.both(Served.end, self.now)

    @invariant()
    def alike(self) -> None:
        if hasattr(self, "one"):
            assert self.one.seen() == self.other.seen()
            assert self.one.log == self.other.log
            assert repr(self.one.scheduler) == repr(self.other.scheduler)
            assert self.one.scheduler.counters == self.other.scheduler.counters
            assert self.one.scheduler.estimated_wait() == self.other.scheduler.estimated_wait()
            assert self.other.as_cohorts == 0
            if not self.one.batch.rows:
                self.one.scheduler.check_invariants()
                self.other.scheduler.check_invariants()

    def teardown(self) -> None:
        if hasattr(self, "one"):
            self.end_batch()
            self.both(Served.run, self.now)
            self.alike()


CohortMachine.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=50, deadline=None)
test_cohorts_change_nothing = CohortMachine.TestCase
