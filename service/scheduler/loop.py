"""The asynchronous shell of the scheduler: runs what it decides, and lets callers wait for the answer."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from time import perf_counter
from typing import TypeVar

from service.core.clock import Clock
from service.core.errors import UnrollError
from service.engine.base import Engine, Tensors
from service.scheduler.scheduler import Scheduler
from service.scheduler.work import Action, Batch, Chunk, Outcome, Reply, Session
from service.store.base import Store

T = TypeVar("T")

#: A batch estimated to take longer runs in the engine's thread, so that the event loop stays free.
INLINE_SECONDS = 0.001
#: How often idle sessions are looked for when nothing else happens.
_TICK_SECONDS = 1.0


class Loop:
    """One model version's loop. executor: the device's single engine thread. on_batch: called after each batch."""

    def __init__(
        self,
        scheduler: Scheduler,
        engine: Engine,
        store: Store,
        clock: Clock,
        executor: Executor,
    ) -> None:
        self.scheduler = scheduler
        self.engine = engine
        self.store = store
        self.clock = clock
        self._executor = executor
        self.on_batch: Callable[[Batch, float], None] = lambda batch, seconds: None
        self._work = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    # ── what callers wait for ────────────────────────────────────────────────────────────────────

    async def sequences(self, batch: Sequence[Tensors], timeout: float) -> list[Reply]:
        """Whole sequences from the initial state, each input (time, *shape); timeout: seconds until they have begun.

        Returns all replies, or raises the first error, the other sequences being cancelled.
        """
        now = self.clock.now()
        chunks: list[Chunk] = []
        try:
            for inputs in batch:
                chunks.append(self.scheduler.submit_sequence(inputs, now, now + timeout))  # noqa: PERF401 one may raise
            self._work.set()
            return await asyncio.gather(*map(self._future, chunks))
        except BaseException:
            for chunk in chunks:
                self.scheduler.cancel(chunk, self.clock.now())
            raise

    async def steps(
        self,
        session_id: str,
        inputs: Tensors,
        timeout: float,
        *,
        position: int | None = None,
        start: bool = False,
        final: bool = False,
    ) -> Reply:
        """Steps of a session, see `Scheduler.submit_steps`; timeout: seconds until they must have begun."""
        now = self.clock.now()
        answer = self.scheduler.submit_steps(
            session_id, inputs, now, now + timeout, position=position, start=start, final=final
        )
        return answer if isinstance(answer, Reply) else await self._outcome(answer)

    async def act(self, session_id: str, run: Callable[[Session], T]) -> T:
        """Run `run(session)` between batches, in the session's turn; its exception is raised here."""
        action = self.scheduler.submit_action(session_id, run, self.clock.now())
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        action.listeners.append(partial(_resolve, future))
        self._work.set()
        return await future

    async def _outcome(self, chunk: Chunk) -> Reply:
        """What became of a session's chunk. A caller that is cancelled cancels it, unless a retry waits for it too."""
        future = self._future(chunk)
        listener = chunk.listeners[-1]
        self._work.set()
        try:
            return await future
        except asyncio.CancelledError:
            chunk.listeners.remove(listener)
            if not chunk.listeners:
                self.scheduler.cancel(chunk, self.clock.now())
            raise

    def _future(self, chunk: Chunk) -> asyncio.Future[Reply]:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        chunk.listeners.append(partial(_resolve, future))
        return future

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Runs until cancelled."""
        self._tick()
        try:
            while True:
                await self._turn()
        finally:
            if self._timer is not None:
                self._timer.cancel()

    async def _turn(self) -> None:
        actions, batch = self.scheduler.next_turn(self.clock.now())
        for action in actions:
            self._act(action)
        if batch:
            started = perf_counter()
            results = await self._execute(batch)
            seconds = perf_counter() - started
            await self.store.commit(batch)
            self.scheduler.finish(batch, results, self.clock.now(), seconds)
            self.on_batch(batch, seconds)
            await asyncio.sleep(0)  # replies leave, new work arrives
        elif not actions:
            self._work.clear()
            await self._work.wait()

    async def _execute(self, batch: Batch) -> Sequence[Tensors | UnrollError]:
        if sum(row.steps for row in batch) * self.scheduler.seconds_per_step <= INLINE_SECONDS:
            return self.engine.run(batch)
        return await asyncio.get_running_loop().run_in_executor(self._executor, self.engine.run, batch)

    def _act(self, action: Action) -> None:
        outcome: object
        try:
            outcome = action.run()
        except UnrollError as error:
            outcome = error
        self.scheduler.finish_action(action, outcome, self.clock.now())

    def _tick(self) -> None:
        self._work.set()
        self._timer = asyncio.get_running_loop().call_later(_TICK_SECONDS, self._tick)


def _resolve(future: asyncio.Future, outcome: Outcome | object) -> None:
    if future.done():
        return
    if isinstance(outcome, UnrollError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
