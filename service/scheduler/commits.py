"""Commits: what has run of durable sessions is put into the store, and counts as applied once the store has it."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from unroll.service.core.errors import UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.chunk import Action, Chunk, Group, PendingCommit
from unroll.service.scheduler.completion import Completion
from unroll.service.scheduler.groups import Groups
from unroll.service.scheduler.session import Session, Work
from unroll.service.store.interface import Commit, Tokens

#: The commits, and the result of each.
_Results = Iterator[tuple[Commit, UnrollError | None]]


class Commits:
    """Makes the commits of what has run, and completes it once they have a result."""

    def __init__(self, completion: Completion, groups: Groups) -> None:
        self._completion = completion
        self._groups = groups
        self._replay = completion.replay
        self._next_token = Tokens().next

    def of(
        self, model: str, pending: Sequence[PendingCommit], read_rows: Callable[[list[int]], np.ndarray]
    ) -> list[Commit]:
        """A commit of each chunk, and of each row of a group that did not fail.

        Args:
            model: its name.
            pending: what `Scheduler.complete` returned.
            read_rows: returns the states in some slots.
        """
        rows = read_rows([session.slot for work, _, failed in pending for session in _sessions_of(work, failed)])
        content, size = rows.tobytes(), rows[0].nbytes
        states = iter([content[begin : begin + size] for begin in range(0, len(content), size)])
        commits: list[Commit] = []
        for work, outputs, failed in pending:
            if isinstance(work, Group):
                lasts = self._replay.lasts_after(work, outputs)
                for row, (session, last) in enumerate(zip(work.sessions, lasts, strict=True)):
                    if row not in failed:
                        commits.append(self._commit(model, session, session.position + work.length, next(states), last))
                continue
            assert work.session is not None
            last = self._replay.last_after(work.session, work, outputs)
            commit = self._commit(model, work.session, work.start + work.length, next(states), last)
            commit.begins |= work.opening is not None
            commit.ends = work.final
            commits.append(commit)
        return commits

    def _commit(self, model: str, session: Session, position: int, state: bytes, last: bytes) -> Commit:
        durable = session.durable
        assert durable is not None
        token = durable.token
        key = model, session.id
        return Commit(key, token, self._next_token(), durable.origin, position, state, last, not token)

    def complete(
        self,
        pending: Sequence[PendingCommit],
        commits: Sequence[Commit],
        errors: Sequence[UnrollError | None],
        batch_rows: int,
        now: float,
    ) -> None:
        """The store has taken the commits that were made of what is pending.

        With an error, it may not have it: the copy of the session here is stale, and all that it accepted fails.

        Args:
            errors: of each commit; None: the store has it.
            batch_rows: of the batch that they ran in.
            now: the time.
        """
        self._completion.batch_rows = batch_rows
        results = zip(commits, errors, strict=True)
        for work, outputs, failed in pending:
            if isinstance(work, Group):
                self._complete_group(work, outputs, dict(failed), results, now)
            else:
                self._complete_chunk(work, outputs, *next(results), now)
        self._completion.batch_rows = 0

    def _complete_chunk(
        self, chunk: Chunk, outputs: Tensors, commit: Commit, error: UnrollError | None, now: float
    ) -> None:
        assert chunk.session is not None
        chunk.running = False
        behind = _note(chunk.session, commit, error)
        if error is None:
            self._completion.complete(chunk, outputs, now)
        else:
            self._completion.fail(chunk, error, now)
            self._fail_behind(behind, error, now)

    def _complete_group(
        self, group: Group, outputs: Tensors, errors: dict[int, UnrollError], results: _Results, now: float
    ) -> None:
        """errors: of the rows that were not committed."""
        behind = []
        for row, session in enumerate(group.sessions):
            if row not in errors:
                commit, error = next(results)
                works = _note(session, commit, error)
                if error is not None:
                    errors[row] = error
                    behind.append((works, error))
        self._groups.complete(group, outputs, errors, now)
        for works, error in behind:
            self._fail_behind(works, error, now)

    def _fail_behind(self, behind: list[Work], error: UnrollError, now: float) -> None:
        for work in behind:
            if isinstance(work, Action):
                work.answer(error)
                continue
            assert isinstance(work, Chunk), "groups are never pending"
            if work.outcome is None:
                self._completion.fail(work, error, now)


def _note(session: Session, commit: Commit, error: UnrollError | None) -> list[Work]:
    """What the result of its commit means for the session; returns the work that waits behind it and must fail."""
    durable = session.durable
    assert durable is not None
    if error is None:
        durable.token = commit.token
        return []
    durable.stale = True
    progress = session.own_progress
    behind, progress.pending = progress.pending or [], None
    return behind


def _sessions_of(work: Chunk | Group, failed: dict[int, UnrollError]) -> list[Session]:
    """The sessions that are committed."""
    if isinstance(work, Group):
        return [session for row, session in enumerate(work.sessions) if row not in failed] if failed else work.sessions
    assert work.session is not None
    return [work.session]
