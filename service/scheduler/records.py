"""Sessions as records and back: what the scheduler knows of a session, but for its state row, which is the engine's."""

from collections.abc import Iterable, Sequence

import numpy as np

from unroll.bundle import TensorSpec
from unroll.service.engine.interface import Tensors
from unroll.service.scheduler.work import Applied, Reply, Result, Session, payload_digest
from unroll.service.state.last_steps import LastSteps
from unroll.service.store.record import Kept, pack_last


class Records:
    """outputs: the model's. last_steps: where the scheduler has what sessions do not keep themselves."""

    def __init__(self, outputs: Sequence[TensorSpec], last_steps: LastSteps | None) -> None:
        self._outputs = outputs
        self._last_steps = last_steps

    def kept(self, session: Session) -> tuple[Kept, ...]:
        """The chunks of a session that can be asked for again. It is looked at by itself."""
        return tuple(map(_kept, self.applied(session)))

    def applied(self, session: Session) -> tuple[Applied, ...]:
        if not session.stepped or self._last_steps is None:
            return session.applied
        reply = Reply(self._last_steps.answer(session.slot), session.position)
        return (Applied(session.position - 1, payload_digest(self._last_steps.payload(session.slot)), reply),)

    def last_after(self, result: Result) -> bytes:
        """What can be asked for again of a durable session when this is applied."""
        chunk, session = result.chunk, result.session
        new = Kept(chunk.start, chunk.length, payload_digest(chunk.inputs), _bytes(result.outputs))
        before = map(_kept, session.applied) if session.depth > 1 else ()
        return pack_last(session.depth, (*before, new)[-session.depth :])

    def read(self, kept: Iterable[Kept]) -> tuple[Applied, ...]:
        return tuple(Applied(k.start, k.digest, Reply(self._tensors(k), k.start + k.steps)) for k in kept)

    def _tensors(self, kept: Kept) -> Tensors:
        arrays, begin = [], 0
        for spec in self._outputs:
            shape = (kept.steps, *spec.shape) if spec.time else spec.shape
            array = np.frombuffer(kept.outputs, spec.numpy, int(np.prod(shape)), begin).reshape(shape)
            begin += array.nbytes
            arrays.append(array)
        return tuple(arrays)


def _kept(applied: Applied) -> Kept:
    return Kept(applied.start, applied.reply.position - applied.start, applied.digest, _bytes(applied.reply.outputs))


def _bytes(outputs: Tensors) -> bytes:
    return outputs[0].tobytes() if len(outputs) == 1 else b"".join([array.tobytes() for array in outputs])
