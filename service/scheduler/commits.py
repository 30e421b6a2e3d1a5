"""Commits: work of durable sessions is written to the store after it runs, and counts as applied afterwards.

The store refuses a commit if another replica has updated the session. Then all accepted work of the session fails, and
is submitted again, based on the record that came with the refusal.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from unroll.service.core.errors import SessionContended, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.chunk import Action, Chunk, Group, PendingCommit
from unroll.service.scheduler.completion import Completion
from unroll.service.scheduler.groups import Groups
from unroll.service.scheduler.reply import payload_digests
from unroll.service.scheduler.session import OPEN, Session, Work
from unroll.service.store.interface import Commit, Tokens
from unroll.service.store.record import Record, pack, pack_steps, split_rows

#: Each commit with its result.
_Results = Iterator[tuple[Commit, UnrollError | None]]
#: Writes the state in a slot.
WriteRow = Callable[[int, np.ndarray], None]


class Commits:
    """Builds commits from work that has run, and completes the work when the commits have a result."""

    def __init__(self, completion: Completion, groups: Groups) -> None:
        self._completion = completion
        self._groups = groups
        self._last_after = completion.replay.last_after
        self._tokens = Tokens()

    def of(
        self, model: str, pending: Sequence[PendingCommit], read_rows: Callable[[list[int]], np.ndarray]
    ) -> list[Commit]:
        """One commit per chunk, and one per successful row of a group.

        Args:
            pending: Returned by `Scheduler.complete`.
            read_rows: Reads the states in the given slots.
        """
        rows = read_rows([session.slot for work, _, _ in pending for session in _sessions_of(work)])
        commits: list[Commit] = []
        end = 0
        for work, outputs, failed in pending:
            begin, end = end, end + work.row_count
            if isinstance(work, Chunk):
                commits.append(self._of_chunk(model, work, outputs, rows[begin].tobytes()))
            else:
                commits += self._of_group(model, work, outputs, failed, rows[begin:end])
        return commits

    def _of_chunk(self, model: str, chunk: Chunk, outputs: Tensors, row: bytes) -> Commit:
        session = chunk.session
        assert session is not None
        durable = session.durable
        assert durable is not None
        last = self._last_after(session, chunk, outputs)
        content = pack(durable.origin, chunk.start + chunk.length, row, last)
        begins = chunk.opening is not None or not durable.token
        return Commit((model, session.id), durable.token, self._tokens.next(), content, begins, chunk.final)

    def _of_group(
        self, model: str, group: Group, outputs: Tensors, failed: dict[int, UnrollError], rows: np.ndarray
    ) -> list[Commit]:
        links = [session.durable for session in group.sessions if session.durable is not None]
        positions = np.array([session.own_progress.position for session in group.sessions], np.uint64)
        contents = pack_steps(
            [durable.origin for durable in links],
            positions + np.uint64(group.length),
            group.length,
            rows,
            payload_digests(split_rows(_bytes_of_rows(group.inputs))),
            _bytes_of_rows(outputs),
        )
        keys = [(model, session.id) for session in group.sessions]
        commits = list(map(Commit, keys, [durable.token for durable in links], self._tokens.take(len(links)), contents))
        return [commit for row, commit in enumerate(commits) if row not in failed] if failed else commits

    def complete(
        self,
        pending: Sequence[PendingCommit],
        commits: Sequence[Commit],
        errors: Sequence[UnrollError | None],
        batch_rows: int,
        now: float,
        write_row: WriteRow,
    ) -> None:
        """Complete pending work after its commits.

        After an error, the store may or may not have the commit, and all accepted work of the session fails.

        Args:
            pending: The work that the commits were built from.
            commits: Returned by `of`.
            errors: Result of each commit; None on success.
            batch_rows: Rows of the work's batch.
            write_row: Writes the state in a slot.
        """
        self._completion.batch_rows = batch_rows
        results = zip(commits, errors, strict=True)
        for work, outputs, failed in pending:
            if isinstance(work, Group):
                self._complete_group(work, outputs, failed, results, now, write_row)
            else:
                self._complete_chunk(work, outputs, *next(results), now, write_row)
        self._completion.batch_rows = 0

    def _complete_chunk(
        self,
        chunk: Chunk,
        outputs: Tensors,
        commit: Commit,
        error: UnrollError | None,
        now: float,
        write_row: WriteRow,
    ) -> None:
        assert chunk.session is not None
        chunk.running = False
        behind = self._note(chunk.session, commit, error, write_row)
        if error is None:
            self._completion.complete(chunk, outputs, now)
        else:
            self._completion.fail(chunk, error, now)
            self._fail_behind(behind, error, now)

    def _complete_group(
        self,
        group: Group,
        outputs: Tensors,
        failed: dict[int, UnrollError],
        results: _Results,
        now: float,
        write_row: WriteRow,
    ) -> None:
        errors, behind = dict(failed), []
        ran = [(row, session) for row, session in enumerate(group.sessions) if row not in failed]
        for (row, session), (commit, error) in zip(ran, results, strict=False):  # `results` goes on with later work
            works = self._note(session, commit, error, write_row)
            if error is not None:
                errors[row] = error
                behind.append((works, error))
        self._groups.complete(group, outputs, errors, now)
        for works, error in behind:
            self._fail_behind(works, error, now)

    def _note(self, session: Session, commit: Commit, error: UnrollError | None, write_row: WriteRow) -> Sequence[Work]:
        """Update the session after its commit. Returns the work queued behind it, which must fail after an error."""
        durable = session.durable
        assert durable is not None
        if error is None:
            durable.token = commit.token
            return ()
        progress = session.own_progress
        behind, progress.pending = progress.pending or [], None
        self.update(session, error.record if isinstance(error, SessionContended) else None, write_row)
        return behind

    def update(self, session: Session, record: Record | None, write_row: WriteRow) -> None:
        """Continue the session from the store's record, or note that it must be looked up first."""
        durable = session.durable
        assert durable is not None
        # A copy that was already stale stays so: calls that wait for its lookup precede the work that fails here.
        if record is None or record.origin != session.origin or session.life is not OPEN or durable.stale:
            durable.stale = True
        else:
            self._completion.adopt(session, record)
            if record.row:
                write_row(session.slot, np.frombuffer(record.row, "<f4"))

    def _fail_behind(self, behind: Sequence[Work], error: UnrollError, now: float) -> None:
        for work in behind:
            if isinstance(work, Action):
                work.answer(error)
                continue
            assert isinstance(work, Chunk), "groups are never pending"
            if work.outcome is None:
                self._completion.fail(work, error, now)


def _sessions_of(work: Chunk | Group) -> list[Session]:
    if isinstance(work, Group):
        return work.sessions
    assert work.session is not None
    return [work.session]


def _bytes_of_rows(tensors: Tensors) -> np.ndarray:
    """Each row's tensors concatenated: (rows, bytes), uint8."""
    blocks = [np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8) for array in tensors]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
