"""An engine with an integer as its state, and the fold that recomputes that state."""

from collections.abc import Callable, Sequence

import numpy as np

from unroll.bundle import TensorSpec
from unroll.service.core.errors import EngineFailed, NonFiniteInput, UnrollError
from unroll.service.engine.engine import Rows, Tensors
from unroll.service.scheduler.batch import Batch
from unroll.service.scheduler.chunk import Chunk, Opening
from unroll.service.scheduler.limits import ModelTraits, SchedulerLimits, SessionLimits
from unroll.service.scheduler.reply import Reply
from unroll.service.scheduler.scheduler import Scheduler
from unroll.service.scheduler.session import Session

START = 7
#: A deadline no test reaches.
LATER = 1e9


def fold(steps: Sequence[int], state: int = START) -> list[int]:
    """Return the state after each step. It depends on all earlier steps and on their order."""
    states = []
    for step in steps:
        state = (state * 31 + step) % 1_000_003
        states.append(state)
    return states


class FoldEngine:
    """Outputs the state after each step, and the final state as a second output without a time axis."""

    def __init__(self, rows: int) -> None:
        self.rows = [START] + [-1] * (rows - 1)
        self.failing: set[int] = set()  # steps that fail their row

    def run(self, rows: Rows) -> tuple[Tensors, dict[int, UnrollError]]:
        states = np.zeros((len(rows.lens), max(rows.lens)), np.int64)
        failed: dict[int, UnrollError] = {}
        before = [self.rows[source] for source in rows.sources]
        for i, (length, target) in enumerate(zip(rows.lens, rows.targets, strict=True)):
            steps = rows.inputs[0][i, :length].tolist()
            assert length > 0
            assert before[i] >= 0, "a row was read that was never written"
            if self.failing.intersection(steps):
                failed[i] = EngineFailed("as asked")
                continue
            states[i, :length] = fold(steps, before[i])
            self.rows[target] = int(states[i, length - 1])
        last = np.array([states[i, length - 1] for i, length in enumerate(rows.lens)])
        return (states, last), failed


#: A step the validation rejects.
INVALID = 97


def invalid_values(inputs: Tensors) -> dict[int, UnrollError]:
    return {row: NonFiniteInput("as asked") for row in np.flatnonzero(inputs[0][:, 0] == INVALID).tolist()}


class Joiner:
    """The listener of a joined step. Calls `then` with the outputs over time or with the error."""

    patient = False

    def __init__(self, then: Callable[[list[int] | UnrollError], object]) -> None:
        self.then = then

    @staticmethod
    def write(outputs: Tensors) -> list[list[int]]:
        return outputs[0].tolist()

    def complete(self, written: list[int], position: int) -> None:
        self.then(written)

    def fail(self, error: UnrollError) -> None:
        self.then(error)


def join(
    scheduler: Scheduler,
    session: Session,
    step: int,
    joiner: Joiner,
    now: float = 0.0,
    position: int | None = None,
    patience: float = 50,
) -> bool:
    return scheduler.joined.join(session, position, np.int64(step).tobytes(), now, now + patience, joiner)


def scheduler(
    capacity: int = 4,
    *,
    idle_timeout: float | None = 100.0,
    tombstone_life: float = 1000.0,
    cuttable: bool = True,
    ragged: bool = True,
    max_batch: int = 3,
    max_batch_steps: int = 12,
    piece_steps: int = 4,
    max_queue: int = 50,
    overload_wait: float = 0.02,
    reply_bytes: int = 2**20,
) -> Scheduler:
    return Scheduler(
        ModelTraits(
            (TensorSpec("step", "int64", (), True),),
            (TensorSpec("states", "int64", (), True), TensorSpec("last", "int64", (), False)),
            cuttable,
            ragged,
            invalid_values,
        ),
        SessionLimits(capacity, idle_timeout, tombstone_life, tombstones=20, reply_bytes=reply_bytes),
        SchedulerLimits(max_batch, max_batch_steps, piece_steps, max_queue, overload_wait),
    )


def inputs(*steps: int) -> Tensors:
    return (np.array(steps),)


def find(scheduler: Scheduler, session_id: str, now: float = 0.0) -> Session:
    return scheduler.sessions.find_detached(session_id, now)


def submit(
    scheduler: Scheduler,
    session_id: str,
    steps: Tensors,
    now: float,
    deadline: float,
    *,
    position: int | None = None,
    start: bool = False,
    final: bool = False,
) -> Chunk | Reply:
    """Submit a chunk as the API does; `start` opens the session if it does not exist."""
    session = scheduler.sessions.get_detached(session_id, now)
    chunk = Chunk(steps, session, position, final=final)
    if session is None:
        if (reply := scheduler.replay_closing(session_id, chunk, now)) is not None:
            return reply
        if not start:
            raise scheduler.sessions.closed.error(session_id, now)
        chunk.opening = Opening(session_id)
    return scheduler.submit(chunk, now, deadline)


def submit_sequence(scheduler: Scheduler, steps: Tensors, now: float, deadline: float) -> Chunk:
    chunk = Chunk(steps)
    assert scheduler.submit(chunk, now, deadline) is chunk
    return chunk


def turn(scheduler: Scheduler, engine: FoldEngine, now: float = 0.0) -> Batch:
    """Run one turn of the loop and return its batch."""
    actions, batch = scheduler.next_turn(now)
    for action in actions:
        scheduler.complete_action(action, action.run(), now)
    if batch.rows:
        scheduler.complete(batch, *engine.run(batch), now)
    return batch


def run_until_idle(scheduler: Scheduler, engine: FoldEngine, now: float = 0.0) -> list[Batch]:
    batches = []
    while not scheduler.idle:
        batches.append(turn(scheduler, engine, now))
        scheduler.check_invariants()
    return batches


def names(batch: Batch) -> list[str]:
    """Return the session ids of the batch."""
    return [work.session.id for work in batch.work if isinstance(work, Chunk) and work.session is not None]


def answer(work: Chunk | Reply) -> list[int]:
    """Return the outputs over time of an answered chunk."""
    reply = work.outcome if isinstance(work, Chunk) else work
    assert isinstance(reply, Reply), reply
    assert reply.outputs[1] == reply.outputs[0][-1]
    return reply.outputs[0].tolist()


def failure(chunk: Chunk | Reply) -> str:
    """Return the error code of a failed chunk."""
    assert isinstance(chunk, Chunk)
    assert isinstance(chunk.outcome, UnrollError), chunk.outcome
    return chunk.outcome.code
