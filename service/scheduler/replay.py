"""The replay cache answers retries with the replies of the chunks that each session applied last.

A chunk at a position that the session has passed is a retry. It gets the original reply if the chunk is still
remembered and has the same payload. A session remembers its last `depth` chunks, usually a single step. Single steps
are rows of a table, which is written once per batch; all other chunks are kept with the session.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from unroll.service.core.errors import PayloadMismatch, PositionGap, PositionTooOld, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.chunk import Chunk, Group, Step
from unroll.service.scheduler.limits import ModelTraits
from unroll.service.scheduler.reply import Reply, payload_digest, to_bytes
from unroll.service.scheduler.session import Cohort, Session
from unroll.service.state.step_table import StepTable
from unroll.service.store.record import Kept, pack_last, pack_last_chunk

#: The limit has room for this many replies of the largest size.
_LEAST_REPLIES = 64


class ReplayCache:
    """Remembers applied chunks and recognises their retries.

    Args:
        limit: Maximum total size of the replies that sessions keep; the table of single steps does not count.

    Attributes:
        kept_bytes: Current total size of those replies.
    """

    def __init__(self, traits: ModelTraits, rows: int, limit: int) -> None:
        self._outputs = traits.outputs
        self._limit = limit
        self._largest = limit // _LEAST_REPLIES  # bytes of one reply: a few large ones must not displace the rest
        self.kept_bytes = 0
        fits = StepTable.fits(traits.inputs, traits.outputs)
        self._steps = StepTable(rows, traits.inputs, traits.outputs) if fits else None

    # ── remembering ──────────────────────────────────────────────────────────────────────────────

    def write_steps(
        self, slots: np.ndarray, inputs: Tensors, outputs: Tensors, failed: Mapping[int, UnrollError]
    ) -> None:
        """Write single steps to the table, except failed rows. Tensors: each (rows, ...)."""
        if self._steps is None:
            return
        if failed:
            good = [row for row in range(len(slots)) if row not in failed]
            slots = slots[good]
            inputs, outputs = tuple([a[good] for a in inputs]), tuple([a[good] for a in outputs])
        self._steps.write(slots, inputs, outputs)

    def write_last_step(self, cohort: Cohort) -> None:
        """Write a cohort's last step to the table, unless it is there already."""
        if cohort.last is not None and self._steps is not None:
            self._steps.write(cohort.slots, *cohort.last)

    def remember(
        self, session: Session, start: int, inputs: Tensors, outputs: Tensors, *, closes: bool = False
    ) -> bool:
        """Remember the chunk that the session has just applied.

        Args:
            start: Position of the chunk's first step.
            closes: The chunk closes the session, which then loses its row of the table.

        Returns:
            False if there is no room for the reply. A retry is then recognised but refused.
        """
        if len(inputs[0]) == 1 and not closes and self.remember_step(session):
            return True
        before = session.applied or ()
        self._replace(session, before[max(0, len(before) + 1 - session.depth) :])
        fits = self._has_room(sum([array.nbytes for array in outputs]))
        content = to_bytes(outputs) if fits else b""
        chunk = Kept(start, session.position - start, payload_digest(inputs), content)
        self._replace(session, (*(session.applied or ()), chunk))
        return fits

    def remember_step(self, session: Session) -> bool:
        """Remember the single step that the session has just applied, if the table has it."""
        if not self.has_row(session):
            return False
        self._replace(session, None)
        return True

    @property
    def has_table(self) -> bool:
        """Whether steps are small enough for the table."""
        return self._steps is not None

    def has_row(self, session: Session) -> bool:
        """Whether the table has the session's single steps, so that there is always room for the reply."""
        return session.depth == 1 and self._steps is not None

    def forget(self, session: Session) -> None:
        self._replace(session, ())

    def adopt(self, session: Session, kept: Iterable[Kept]) -> None:
        """Remember the chunks from a session's record, as far as there is room."""
        self._replace(session, ())
        self._replace(session, tuple([chunk for chunk in kept if self._has_room(len(chunk.outputs))]))

    def set_depth(self, session: Session, depth: int) -> None:
        """Keep the session's last `depth` chunks for retries."""
        if depth > 1 or session.applied is not None:
            self._replace(session, self.applied_chunks(session)[-depth:])
        session.depth = depth

    # ── recognising ──────────────────────────────────────────────────────────────────────────────

    def recognise(self, session: Session, chunk: Chunk) -> Chunk | Reply:
        """Find the accepted chunk that `chunk` repeats, or the reply if that chunk was applied.

        Raises:
            PositionGap: The position is ahead of the session.
            PositionTooOld: The chunk at this position is no longer remembered.
            PayloadMismatch: The chunk at this position has another payload.
        """
        expected, position = session.expected, chunk.start
        if position > expected:
            raise PositionGap(f"the session is at {expected}, the chunk begins at {position}", expected=expected)
        if (accepted := _accepted(session, chunk)) is not None:
            accepted.abandoned = None  # if its first client disconnected, this one replaces it
            return accepted
        reply = self._reply_to(session, chunk)
        if reply is None:
            raise PositionTooOld(
                f"the session is at {expected}; only its last {'chunk' if session.depth == 1 else 'chunks'} "
                "can be retried, and only if its reply was not too large to keep",
                expected=expected,
            )
        if chunk.final:
            raise PayloadMismatch("the chunk was applied without ending the session", expected=expected)
        return reply

    def applied_chunks(self, session: Session) -> tuple[Kept, ...]:
        """The session's remembered chunks, latest last."""
        if session.applied is not None:
            return session.applied
        assert self._steps is not None
        digest = payload_digest(self._steps.inputs(session.slot))
        return (Kept(session.position - 1, 1, digest, to_bytes(self._steps.outputs(session.slot))),)

    def last_outputs(self, session: Session) -> Tensors | None:
        """A copy of the last chunk's outputs; None if they were not kept."""
        applied = self.applied_chunks(session)
        last = applied[-1] if applied else None
        return self._tensors(last) if last and last.outputs and last.start + last.steps == session.position else None

    def _reply_to(self, session: Session, chunk: Chunk) -> Reply | None:
        position = chunk.start
        if session.applied is None:
            if position != session.position - 1:
                return None
            assert self._steps is not None
            if not _same(self._steps.inputs(session.slot), chunk.inputs):
                raise _mismatch(session, position)
            return Reply(self._steps.outputs(session.slot), position + 1)
        for applied in session.applied:
            if applied.start == position:
                if applied.digest != payload_digest(chunk.inputs):
                    raise _mismatch(session, position)
                if not applied.outputs:
                    raise PositionTooOld(
                        f"the chunk at {position} was applied, and its reply was too large to keep; "
                        f"the session is at {session.expected}",
                        expected=session.expected,
                    )
                return self.reply_of(applied)
        return None

    # ── records ──────────────────────────────────────────────────────────────────────────────────

    def kept(self, session: Session) -> tuple[Kept, ...]:
        """The session's remembered chunks, in record form."""
        return _with_reply(self.applied_chunks(session))

    def last_after(self, session: Session, chunk: Chunk, outputs: Tensors) -> bytes:
        """The record's `last` field after the session has applied the chunk."""
        content, depth = to_bytes(outputs), session.depth
        fits = len(content) <= self._largest
        if depth == 1 and fits:
            return pack_last_chunk(chunk.start, chunk.length, payload_digest(chunk.inputs), content)
        before = _with_reply(session.applied or ()) if depth > 1 else ()
        if not fits:
            return pack_last(depth, before[max(0, len(before) + 1 - depth) :])
        new = Kept(chunk.start, chunk.length, payload_digest(chunk.inputs), content)
        return pack_last(depth, (*before, new)[-depth:])

    def reply_of(self, kept: Kept) -> Reply:
        return Reply(self._tensors(kept), kept.start + kept.steps)

    def _tensors(self, kept: Kept) -> Tensors:
        arrays, begin = [], 0
        for spec in self._outputs:
            shape = (kept.steps, *spec.shape) if spec.time else spec.shape
            array = np.frombuffer(kept.outputs, spec.numpy, math.prod(shape), begin).reshape(shape)
            begin += array.nbytes
            arrays.append(array)
        return tuple(arrays)

    # ── room ─────────────────────────────────────────────────────────────────────────────────────

    def _has_room(self, size: int) -> bool:
        return size <= self._largest and self.kept_bytes + size <= self._limit

    def _replace(self, session: Session, applied: tuple[Kept, ...] | None) -> None:
        if session.applied:
            self.kept_bytes -= sum([len(chunk.outputs) for chunk in session.applied])
        if applied:
            self.kept_bytes += sum([len(chunk.outputs) for chunk in applied])
        session.applied = applied

    def check_invariants(self, sessions: Iterable[Session]) -> None:
        """Raises AssertionError if `kept_bytes` differs from the replies that these sessions keep."""
        kept = sum(len(chunk.outputs) for session in sessions for chunk in session.applied or ())
        assert kept == self.kept_bytes <= self._limit, f"{self.kept_bytes} bytes of {kept} are counted"


def _accepted(session: Session, chunk: Chunk) -> Chunk | None:
    """The accepted chunk at the position of `chunk`, which follows it if it is a step or a part of a group."""
    position = chunk.start
    for work in session.own_progress.queue():
        if isinstance(work, Step):
            if session.position == position:
                if work.final != chunk.final or not _same(work.inputs, chunk.inputs):
                    raise _mismatch(session, position)
                chunk.running = True
                work.followers += (chunk,)
                return chunk
        elif isinstance(work, Chunk) and work.start == position:
            if work.final != chunk.final or not _same(work.inputs, chunk.inputs):
                raise _mismatch(session, position)
            return work
        if isinstance(work, Group) and session.position == position:
            row = work.sessions.index(session)
            if chunk.final != (session in work.ending) or not _same(work.inputs_of(row), chunk.inputs):
                raise _mismatch(session, position)
            chunk.running = True
            work.followers.append((row, chunk))
            return chunk
    return None


def _same(one: Tensors, other: Tensors) -> bool:
    if len(one) != len(other):  # one of the two is a rollout
        return False
    return all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def _mismatch(session: Session, position: int) -> PayloadMismatch:
    return PayloadMismatch(f"position {position} was already consumed with another payload", expected=session.expected)


def _with_reply(chunks: Iterable[Kept]) -> tuple[Kept, ...]:
    return tuple([chunk for chunk in chunks if chunk.outputs])
