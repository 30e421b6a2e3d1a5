"""The asynchronous shell of the scheduler: runs what it decides, and lets callers wait for the answer."""

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
from unroll.service.scheduler.chunk import Action, Chunk, GroupReply, PendingCommit
from unroll.service.scheduler.reply import Outcome, Reply
from unroll.service.scheduler.scheduler import Scheduler
from unroll.service.scheduler.session import Cohort, Session
from unroll.service.store.interface import Commit, Store, Tokens

T = TypeVar("T")

#: A batch estimated to take longer runs in the engine's thread, so that the event loop stays free. What is shorter
#: would lose by the way there and back, and on a single core nothing is gained until others would be kept waiting.
INLINE_SECONDS = 0.004 if usable_cores() > 1 else 0.02
#: The same of a batch that a device runs by itself: meanwhile the event loop has better things to do.
LAUNCHED_SECONDS = 0.0005
#: How often idle sessions are looked for when nothing else happens.
_TICK_SECONDS = 1.0


class Loop:
    """One loop of a model version. name: the model's.

    store: where durable sessions are, if there is one. executor: the device's single engine thread. cost: seconds of a
    call, by rows and steps. on_batch: called after each batch, with how many of its rows failed and the seconds it
    took.
    """

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        engine: Engine,
        store: Store | None,
        clock: Clock,
        executor: Executor,
        cost: Callable[[int, int], float],
    ) -> None:
        self.name = name
        self.scheduler = scheduler
        self.engine = engine
        self.store = store
        self.clock = clock
        self._executor = executor
        self._cost = cost
        self.on_batch: Callable[[Batch, int, float], None] = lambda batch, failed, seconds: None
        self._work = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._launched: deque[_Begun] = deque()
        self._tokens = Tokens()
        self._commits: set[asyncio.Task[None]] = set()
        self._crash: BaseException | None = None
        self._ended = 0.0  # when the last batch was

    # ── work, and who is called when it is done ──────────────────────────────────────────────────

    def submit_sequences(
        self,
        batch: Sequence[Tensors],
        timeout: float,
        then: Callable[[list[Reply] | UnrollError], None],
        rows: Sequence[np.ndarray | None] | None = None,
    ) -> Callable[[], None]:
        """Whole sequences, each input (time, *shape), from the initial state, or from the states in `rows`; timeout:
        seconds until they have begun.

        `then` is called once: with all replies, or with the first error, the other sequences being cancelled. What is
        returned cancels them. Raises what `Scheduler.submit` raises; nothing is queued then.
        """
        gathering = _Gathering(self, then)
        now = self.clock.now()
        try:
            for inputs, row in zip(batch, rows or [None] * len(batch), strict=True):
                chunk = Chunk(inputs, state_row=row)
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
        """Queue a chunk, see `Scheduler.submit`, which also says what this raises.

        Args:
            chunk: of a session, or a stateless sequence.
            timeout: seconds until it must have begun.
            then: called once, with the reply or the error.

        Returns:
            The chunk to `leave` if the answer is no longer wanted: this one or, if it is a retry, the accepted one.
            None if the reply was known; then `then` was called already.
        """
        now = self.clock.now()
        accepted = self.scheduler.submit(chunk, now, now + timeout)
        if isinstance(accepted, Reply):
            then(accepted)
            return None
        accepted.listeners += (then,)
        self._work.set()
        return accepted

    def leave(self, chunk: Chunk, then: Callable[[Outcome], None]) -> None:
        """`then` is not to be called any more; if nobody else waits for the chunk, it is cancelled."""
        chunk.listeners = tuple(listener for listener in chunk.listeners if listener is not then)
        if not chunk.listeners:
            self.scheduler.cancel(chunk, self.clock.now())

    def submit_group(
        self,
        sessions: Sequence[Session],
        positions: Sequence[int | None],
        inputs: Tensors,
        timeout: float,
        then: Callable[[GroupReply], None],
        *,
        again: bool = False,
    ) -> list[int]:
        """The next steps of many sessions at once, see `Scheduler.submit_group`."""
        now = self.clock.now()
        left = self.scheduler.submit_group(sessions, positions, inputs, now, now + timeout, then, again=again)
        self._work.set()
        return left

    def submit_cohorts(
        self,
        cohorts: Sequence[Cohort],
        positions: np.ndarray | None,
        inputs: Tensors,
        timeout: float,
        then: Callable[[GroupReply], None],
    ) -> bool:
        """The next step of all sessions of some cohorts, see `Scheduler.submit_cohorts`."""
        now = self.clock.now()
        taken = self.scheduler.submit_cohorts(cohorts, positions, inputs, now, now + timeout, then)
        self._work.set()
        return taken

    async def sequences(self, batch: Sequence[Tensors], timeout: float) -> list[Reply]:
        """`submit_sequences` for who can wait; cancelling the caller cancels the sequences."""
        future: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        cancel = self.submit_sequences(batch, timeout, partial(_resolve, future))
        try:
            return await future
        except asyncio.CancelledError:
            cancel()
            raise

    def act(self, session: Session, run: Callable[[Session], T]) -> "asyncio.Future[T]":
        """Run `run(session)` between batches, in the session's turn; until then it keeps its row."""
        action = self.scheduler.submit_action(session, run, self.clock.now())
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        action.listeners.append(partial(_resolve, future))
        self._work.set()
        return future

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Runs until cancelled; what is on its way to the store is waited for then."""
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
        if len(self._launched) == MAX_LAUNCHED:
            await self._end(self._launched.popleft())
        actions, batch = self.scheduler.next_turn(self.clock.now())
        for action in actions:
            self._act(action)
        if batch:
            failpoints.reach("batched")
            await self._begin(batch)
        elif self._launched and self._launched[0].ready:
            await self._end(self._launched.popleft())
        elif not actions:
            self._work.clear()
            await self._work.wait()

    async def _begin(self, batch: Batch) -> None:
        """Launch it, if the device works by itself: then others are answered meanwhile. Else run it."""
        for slot, row in batch.uploads:
            self.engine.write(slot, row)
        started = perf_counter()
        result = self.engine.launch(batch)
        launched = result is not None
        if result is None:
            while self._launched:
                await self._end(self._launched.popleft())
            result = partial(self.engine.run, batch)
        begun = _Begun(batch, started, result)
        if self._cost(len(batch), batch.longest) > (LAUNCHED_SECONDS if launched else INLINE_SECONDS):
            begun.future = asyncio.get_running_loop().run_in_executor(self._executor, result)
            begun.future.add_done_callback(lambda _: self._work.set())
        if launched:
            self._launched.append(begun)
        else:
            await self._end(begun)

    async def _gather_work(self) -> None:
        """Let replies leave and work arrive, as long as each look at the sockets brings more, or the batch is full.

        Nothing is waited for: a request that is there must be read anyway, and costs less in the batch before it.
        """
        seen = -1
        while seen < self.scheduler.in_flight:
            seen = self.scheduler.in_flight
            await asyncio.sleep(0)
            if seen >= self.scheduler.limits.max_batch:
                return

    async def _end(self, begun: "_Begun") -> None:
        outputs, failed = begun.result() if begun.future is None else await begun.future
        failpoints.reach("ran")
        ended = perf_counter()
        seconds, self._ended = ended - max(begun.started, self._ended), ended
        for chunk in begun.batch.readback:
            assert chunk.workspace is not None
            chunk.state_row = self.engine.read(chunk.workspace)
        results = self.scheduler.complete(begun.batch, outputs, failed, self.clock.now(), seconds)
        self.on_batch(begun.batch, len(failed), seconds)
        if results:
            task = asyncio.create_task(self._commit(results), name=f"commit {self.name}")
            self._commits.add(task)
            task.add_done_callback(self._committed)

    # ── durable sessions ─────────────────────────────────────────────────────────────────────────

    async def _commit(self, results: Sequence[PendingCommit]) -> None:
        """Put what was run into the store, and answer it then. Other batches go on meanwhile."""
        assert self.store is not None
        rows = self.engine.read_rows([result.session.slot for result in results])
        commits = [self._commit_of(result, row.tobytes()) for result, row in zip(results, rows, strict=True)]
        failpoints.reach("before_commit")
        errors = await self.store.commit(commits)
        failpoints.reach("after_commit")
        now = self.clock.now()
        for result, commit, error in zip(results, commits, errors, strict=True):
            self.scheduler.complete_commit(result, commit.token, error, now)
        self._work.set()

    def _commit_of(self, result: PendingCommit, row: bytes) -> Commit:
        session, chunk = result.session, result.chunk
        assert session.durable is not None
        return Commit(
            key=(self.name, session.id),
            expected=session.durable.token,
            token=self._tokens.next(),
            origin=session.durable.origin,
            position=chunk.start + chunk.length,
            row=row,
            last=self.scheduler.replay.last_after(result),
            begins=chunk.opening is not None or not session.durable.token,
            ends=chunk.final,
        )

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
class _Begun:
    """A batch, when it was begun, and what waits for its result; future: the engine's thread is waiting."""

    batch: Batch
    started: float
    result: Callable[[], BatchResult]
    future: asyncio.Future[BatchResult] | None = None

    @property
    def ready(self) -> bool:
        """Can it be ended without keeping new work waiting?"""
        return self.future is None or self.future.done()


class _Gathering:
    """Waits for several chunks: calls `then` once, with all their replies or with the first error."""

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
