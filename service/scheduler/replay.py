"""What answers retries: the chunks that sessions applied last, with their replies.

A chunk that a session sends again at a position it has passed is a retry. It gets the reply of the first time, if the
chunk is still remembered and has the same payload. A session remembers its last `depth` chunks. Most often that is one
single step: such steps are rows of a table, written once per batch; everything else is kept by the session.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from unroll.service.core.errors import PayloadMismatch, PositionGap, PositionTooOld, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.scheduler.batch import row_of
from unroll.service.scheduler.chunk import Chunk, Group, PendingCommit
from unroll.service.scheduler.limits import ModelTraits
from unroll.service.scheduler.reply import AppliedChunk, Reply, payload_digest
from unroll.service.scheduler.session import Cohort, Session
from unroll.service.state.step_table import StepTable
from unroll.service.store.record import Kept, pack_last


class ReplayCache:
    """Remembers applied chunks and recognises their retries.

    Args:
        traits: of the model.
        rows: of the arena.
    """

    def __init__(self, traits: ModelTraits, rows: int) -> None:
        self._outputs = traits.outputs
        fits = StepTable.fits(traits.inputs, traits.outputs)
        self._steps = StepTable(rows, traits.inputs, traits.outputs) if fits else None

    # ── remembering ──────────────────────────────────────────────────────────────────────────────

    def write_steps(
        self, slots: np.ndarray, inputs: Tensors, outputs: Tensors, failed: Mapping[int, UnrollError]
    ) -> None:
        """Put single steps into the table, except of the rows that failed; tensors: each (rows, ...)."""
        if self._steps is None:
            return
        if failed:
            good = [row for row in range(len(slots)) if row not in failed]
            slots = slots[good]
            inputs, outputs = tuple([a[good] for a in inputs]), tuple([a[good] for a in outputs])
        self._steps.write(slots, inputs, outputs)

    def write_last_step(self, cohort: Cohort) -> None:
        """Put the last step of a cohort into the table, unless it is there."""
        if cohort.last is not None and self._steps is not None:
            self._steps.write(cohort.slots, *cohort.last)

    def remember(
        self, session: Session, start: int, inputs: Tensors, outputs: Tensors, *, closes: bool = False
    ) -> None:
        """Remember the chunk that the session has just applied; a single step must be in the table already.

        Args:
            start: the chunk's position.
            closes: the session closes with it and loses its row of the table.
        """
        if len(inputs[0]) == 1 and session.depth == 1 and self._steps is not None and not closes:
            session.applied = None
            return
        applied = AppliedChunk(start, payload_digest(inputs), Reply(outputs, session.position).copy())
        session.applied = (*(session.applied or ()), applied)[-session.depth :]

    def set_depth(self, session: Session, depth: int) -> None:
        """From now on the session's last `depth` chunks can be retried."""
        if depth > 1 or session.applied is not None:
            session.applied = self.applied_chunks(session)[-depth:]
        session.depth = depth

    # ── recognising ──────────────────────────────────────────────────────────────────────────────

    def recognise(self, session: Session, chunk: Chunk) -> Chunk | Reply:
        """Find the accepted chunk, or the reply of the applied one, that `chunk` is a retry of.

        Raises:
            PositionGap: the position lies ahead of the session.
            PositionTooOld: the chunk that began there is not remembered any more.
            PayloadMismatch: another chunk began there.
        """
        expected, position = session.expected, chunk.start
        if position > expected:
            raise PositionGap(f"the session is at {expected}, the chunk begins at {position}", expected=expected)
        if (accepted := _accepted(session, chunk)) is not None:
            accepted.abandoned = None  # its first client went away; now there is one again
            return accepted
        reply = self._reply_to(session, chunk)
        if reply is None:
            raise PositionTooOld(
                f"the session is at {expected}; only its last {'chunk' if session.depth == 1 else 'chunks'} "
                "can be retried",
                expected=expected,
            )
        if chunk.final:
            raise PayloadMismatch("the chunk was applied without ending the session", expected=expected)
        return reply

    def applied_chunks(self, session: Session) -> tuple[AppliedChunk, ...]:
        """The chunks of a session that can be retried, latest last."""
        if session.applied is not None:
            return session.applied
        assert self._steps is not None
        reply = Reply(self._steps.outputs(session.slot), session.position)
        return (AppliedChunk(session.position - 1, payload_digest(self._steps.inputs(session.slot)), reply),)

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
                return applied.reply
        return None

    # ── records ──────────────────────────────────────────────────────────────────────────────────

    def kept(self, session: Session) -> tuple[Kept, ...]:
        """The chunks of a session that can be retried, as its record has them."""
        return tuple(map(_kept, self.applied_chunks(session)))

    def last_after(self, pending: PendingCommit) -> bytes:
        """The record's `last` once this commit is done."""
        chunk, session = pending.chunk, pending.session
        new = Kept(chunk.start, chunk.length, payload_digest(chunk.inputs), _bytes(pending.outputs))
        before = map(_kept, session.applied or ()) if session.depth > 1 else ()
        return pack_last(session.depth, (*before, new)[-session.depth :])

    def read(self, kept: Iterable[Kept]) -> tuple[AppliedChunk, ...]:
        """The chunks that a record has."""
        return tuple(AppliedChunk(k.start, k.digest, Reply(self._tensors(k), k.start + k.steps)) for k in kept)

    def _tensors(self, kept: Kept) -> Tensors:
        arrays, begin = [], 0
        for spec in self._outputs:
            shape = (kept.steps, *spec.shape) if spec.time else spec.shape
            array = np.frombuffer(kept.outputs, spec.numpy, int(np.prod(shape)), begin).reshape(shape)
            begin += array.nbytes
            arrays.append(array)
        return tuple(arrays)


def _accepted(session: Session, chunk: Chunk) -> Chunk | None:
    """The accepted chunk that begins where `chunk` does. If a group has that step, `chunk` joins it."""
    position = chunk.start
    for work in session.own_progress.queue():
        if isinstance(work, Chunk) and work.start == position:
            if work.final != chunk.final or not _same(work.inputs, chunk.inputs):
                raise _mismatch(session, position)
            return work
        if isinstance(work, Group) and session.position == position:
            row = work.sessions.index(session)
            if chunk.final or not _same(row_of(work.inputs, row), chunk.inputs):
                raise _mismatch(session, position)
            chunk.running = True
            work.followers.append((row, chunk))
            return chunk
    return None


def _same(one: Tensors, other: Tensors) -> bool:
    return all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def _mismatch(session: Session, position: int) -> PayloadMismatch:
    return PayloadMismatch(f"position {position} was already consumed with another payload", expected=session.expected)


def _kept(applied: AppliedChunk) -> Kept:
    return Kept(applied.start, applied.reply.position - applied.start, applied.digest, _bytes(applied.reply.outputs))


def _bytes(outputs: Tensors) -> bytes:
    return outputs[0].tobytes() if len(outputs) == 1 else b"".join([array.tobytes() for array in outputs])
