"""The asynchronous shell of the scheduler: runs its batches and actions, and calls the listeners."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TypeVar

import numpy as np

from unroll.service.core import failpoints
from unroll.service.core.clock import Clock
from unroll.service.core.errors import UnrollError
from unroll.service.core.resources import usable_cores
from unroll.service.engine.engine import MAX_LAUNCHED, BatchResult, Engine, Tensors
from unroll.service.scheduler.batch import Batch
from unroll.service.scheduler.chunk import Action, Chunk, Opening, PendingCommit, StepListener
from unroll.service.scheduler.reply import Outcome, Reply
from unroll.service.scheduler.scheduler import Scheduler
from unroll.service.scheduler.session import Session
from unroll.service.store.interface import Store

T = TypeVar("T")

#: A batch with a longer estimate runs in the engine's thread and leaves the event loop free. For a shorter one, the
#: thread switch costs more than it gains. On a single core, the thread improves only fairness.
INLINE_SECONDS = 0.004 if usable_cores() > 1 else 0.02
#: The same threshold for a batch that was launched on a device and runs asynchronously there.
LAUNCHED_SECONDS = 0.0005
#: Interval at which sessions expire when there is no work.
_TICK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class EngineThread:
    """An engine and the thread for its long calls.

    executor: the device's single thread. cost: estimated seconds of a call, by rows and steps.
    """

    engine: Engine
    executor: Executor
    cost: Callable[[int, int], float]


class Loop:
    """Runs the batches of one model version, and calls the listeners of their work.

    Args:
        on_batch: Called after each batch with the number of failed rows and the duration in seconds.
    """

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        engine: EngineThread,
        store: Store | None,
        clock: Clock,
        on_batch: Callable[[Batch, int, float], None] = lambda batch, failed, seconds: None,
    ) -> None:
        self.name = name
        self.scheduler = scheduler
        self.engine = engine.engine
        self.store = store
        self.clock = clock
        self._admission = scheduler.admission
        self._executor = engine.executor
        self._cost = engine.cost
        self._on_batch = on_batch
        self._work = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._launched: deque[_BegunBatch] = deque()
        self._commits: set[asyncio.Task[None]] = set()
        self._crash: BaseException | None = None
        self._ended = 0.0  # when the last batch ended

    # ── submission ───────────────────────────────────────────────────────────────────────────────

    def submit_sequences(
        self,
        batch: Sequence[Tensors],
        timeout: float,
        then: Callable[[list[Reply] | UnrollError], None],
        rows: Sequence[np.ndarray | None] | None = None,
        tenant: str = "",
    ) -> Callable[[], None]:
        """Queue whole sequences, all or nothing. Raises the errors of `Scheduler.submit`.

        Args:
            batch: The inputs of each sequence, each (time, *shape).
            timeout: Seconds within which they must start.
            then: Called once with all replies, or with the first error; an error cancels the other sequences.
            rows: The initial state of each sequence, None for the model's own.
            tenant: The tenant; empty without keys.

        Returns:
            A function that cancels the sequences.
        """
        gathering = _Gathering(self, then)
        now = self.clock.now()
        try:
            for inputs, row in zip(batch, rows or [None] * len(batch), strict=True):
                chunk = Chunk(inputs, state_row=row)
                chunk.tenant, chunk.patient = tenant, bool(gathering.chunks)  # an overload can refuse only the first
                self.scheduler.submit(chunk, now, now + timeout)
                gathering.chunks.append(chunk)
        except UnrollError:
            gathering.cancel()
            raise
        for chunk in gathering.chunks:
            chunk.listeners = (gathering.settled,)
        self._work.set()
        return gathering.cancel

    def submit(self, chunk: Chunk, timeout: float, then: Callable[[Outcome], None]) -> Chunk | None:
        """Queue a chunk. Raises the errors of `Scheduler.submit`.

        Args:
            chunk: A chunk of a session, or a stateless sequence.
            timeout: Seconds within which it must start.
            then: Called once, with the reply or the error.

        Returns:
            The chunk to pass to `leave` if the answer is no longer wanted: this one, or for a retry the accepted one.
            None if `then` has already been called with a remembered reply.
        """
        self._refresh(chunk.session)
        now = self.clock.now()
        accepted = self.scheduler.submit(chunk, now, now + timeout)
        if isinstance(accepted, Reply):
            then(accepted)
            return None
        accepted.listeners += (then,)
        self._work.set()
        return accepted

    def leave(self, chunk: Chunk, then: Callable[[Outcome], None]) -> None:
        """Remove the listener `then`. A chunk without listeners is cancelled."""
        chunk.listeners = tuple(listener for listener in chunk.listeners if listener != then)
        if not chunk.listeners:
            self.scheduler.cancel(chunk, self.clock.now())

    def join_chunk(self, chunk: Chunk, timeout: float, listener: StepListener) -> bool:
        """Queue a chunk of one step, see `Scheduler.join`."""
        self._refresh(chunk.session)
        now = self.clock.now()
        joins = self.scheduler.join(chunk, now, now + timeout, listener)
        self._work.set()
        return joins

    def join(
        self,
        session: Session,
        position: int | None,
        step: bytes,
        timeout: float,
        listener: StepListener,
        *,
        opening: Opening | None = None,
        ends: bool = False,
    ) -> bool:
        """Queue the next step of a session, see `JoinedSteps.join`."""
        if session.durable is not None:
            self._refresh(session)
        now = self.clock.now()
        if not self.scheduler.joined.join(session, position, step, now, now + timeout, listener, opening, ends=ends):
            return False
        self._work.set()
        return True

    def leave_joined(self, session: Session, listener: StepListener) -> None:
        """Cancel a joined step, unless a batch has taken it."""
        self.scheduler.joined.cancel(session, listener, self.clock.now())

    def wake(self) -> None:
        """Call this after queueing work directly at the scheduler."""
        self._work.set()

    def act(self, session: Session, run: Callable[[Session], T]) -> "asyncio.Future[T]":
        """Run `run(session)` between batches, after the session's accepted work. It keeps its row until then."""
        action = self.scheduler.submit_action(session, run, self.clock.now())
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        action.listeners.append(partial(_resolve, future))
        self._work.set()
        return future

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Run until cancelled; then wait for pending commits."""
        self._tick()
        try:
            while True:
                await self._turn()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            if self._commits:
                await asyncio.wait(self._commits)

    async def _turn(self) -> None:
        await self._gather_work()
        if self._crash is not None:
            raise self._crash
        if self.scheduler.idle and not self._launched:
            self.scheduler.sessions.expire(self.clock.now())
            self.scheduler.pace.rest()
            self._work.clear()
            await self._work.wait()
            return
        if len(self._launched) == MAX_LAUNCHED:
            await self._end(self._launched.popleft())
        actions, batch = self.scheduler.next_turn(self.clock.now())
        for action in actions:
            self._act(action)
        if batch.rows:
            failpoints.reach("batched")
            await self._begin(batch)
        elif self._launched and self._launched[0].ready:
            await self._end(self._launched.popleft())
        elif not actions:
            self._work.clear()
            await self._work.wait()

    async def _begin(self, batch: Batch) -> None:
        """Launch the batch if the device runs asynchronously, so that replies can be sent; else run it."""
        started = perf_counter()
        result = self._launch(batch)
        launched = result is not None
        if result is None:
            while self._launched:
                await self._end(self._launched.popleft())
            result = partial(self.engine.run, batch)
        begun = _BegunBatch(batch, started, result)
        if self._cost(batch.rows, batch.longest) > (LAUNCHED_SECONDS if launched else INLINE_SECONDS):
            begun.future = asyncio.get_running_loop().run_in_executor(self._executor, result)
            begun.future.add_done_callback(lambda _: self._work.set())
        if launched:
            self._launched.append(begun)
        else:
            await self._end(begun)

    def _launch(self, batch: Batch) -> Callable[[], BatchResult] | None:
        """Write the states that the batch starts from, and launch it if the device runs asynchronously."""
        for slot, row in batch.uploads:
            self.engine.write(slot, row)
        return self.engine.launch(batch)

    async def _gather_work(self) -> None:
        """Yield to the event loop until a poll of the sockets brings no more work, or the batch is full.

        This never blocks. Requests that have already arrived must be read anyway, and joining this batch is cheaper.
        """
        seen = -1
        while seen < (in_flight := self.scheduler.in_flight):
            seen = in_flight
            await asyncio.sleep(0)
            if seen >= self.scheduler.limits.max_batch:
                return

    async def _end(self, begun: "_BegunBatch") -> None:
        self._complete(begun.batch, begun.started, begun.result() if begun.future is None else await begun.future)

    def _complete(self, batch: Batch, started: float, result: BatchResult) -> None:
        failpoints.reach("ran")
        ended = perf_counter()
        seconds, self._ended = ended - max(started, self._ended), ended
        for chunk in batch.readback:
            assert chunk.workspace is not None
            chunk.state_row = self.engine.read(chunk.workspace)
        commits = self.scheduler.complete(batch, *result, self.clock.now(), seconds)
        self._on_batch(batch, len(result[1]), seconds)
        if commits:
            task = asyncio.create_task(self._commit(commits, batch.rows), name=f"commit {self.name}")
            self._commits.add(task)
            task.add_done_callback(self._committed)

    # ── durable sessions ─────────────────────────────────────────────────────────────────────────

    def _refresh(self, session: Session | None) -> None:
        """Update the copy of a session that other replicas update, too, if the store can be read at once.

        A step on an old copy would run twice, because the store refuses the commit.
        """
        if session is None or (durable := session.durable) is None:
            return
        if not durable.checks or session.active is not None or durable.stale:
            return
        if self.scheduler.is_verified(session.id):
            return
        assert self.store is not None
        durable.checks -= 1
        if (record := self.store.newer((self.name, session.id), durable.token)) is not None:
            self.scheduler.commits.update(session, record, self.engine.write)

    async def _commit(self, pending: Sequence[PendingCommit], batch_rows: int) -> None:
        """Write work that has run to the store, and complete it. Other batches run concurrently."""
        assert self.store is not None
        commits = self.scheduler.commits.of(self.name, pending, self.engine.read_rows)
        failpoints.reach("before_commit")
        errors = await self.store.commit(commits)
        failpoints.reach("after_commit")
        self.scheduler.commits.complete(pending, commits, errors, batch_rows, self.clock.now(), self.engine.write)
        self._work.set()

    def _committed(self, task: asyncio.Task[None]) -> None:
        self._commits.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._crash = error
            self._work.set()

    def _act(self, action: Action) -> None:
        outcome: object
        try:
            outcome = action.run()
        except UnrollError as error:
            outcome = error
        self.scheduler.complete_action(action, outcome, self.clock.now())

    def _tick(self) -> None:
        self._work.set()
        self._timer = asyncio.get_running_loop().call_later(_TICK_SECONDS, self._tick)


@dataclass(slots=True)
class _BegunBatch:
    """A batch that has begun. result: blocks until it is done. future: set if the engine's thread calls `result`."""

    batch: Batch
    started: float
    result: Callable[[], BatchResult]
    future: asyncio.Future[BatchResult] | None = None

    @property
    def ready(self) -> bool:
        """Whether it can be ended without blocking."""
        return self.future is None or self.future.done()


class _Gathering:
    """Waits for several chunks: calls `then` once, with all replies or with the first error."""

    def __init__(self, loop: Loop, then: Callable[[list[Reply] | UnrollError], None]) -> None:
        self.chunks: list[Chunk] = []
        self._loop = loop
        self._then: Callable[[list[Reply] | UnrollError], None] | None = then
        self._settled = 0

    def settled(self, outcome: Outcome) -> None:
        then = self._then
        if then is None:
            return
        self._settled += 1
        if isinstance(outcome, UnrollError):
            self.cancel()
            then(outcome)
        elif self._settled == len(self.chunks):
            self._then = None
            then([chunk.outcome for chunk in self.chunks if isinstance(chunk.outcome, Reply)])

    def cancel(self) -> None:
        self._then = None
        now = self._loop.clock.now()
        for chunk in self.chunks:
            self._loop.scheduler.cancel(chunk, now)


def _resolve(future: asyncio.Future, outcome: Outcome | object) -> None:
    if future.done():
        return
    if isinstance(outcome, UnrollError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
