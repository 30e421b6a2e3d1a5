"""The loop around the scheduler: waiting callers are answered, cancelled ones dropped, replies follow their commit."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from memory_store import MemoryStore
from waiting import PATIENCE, turns

from unroll.bundle import TensorSpec
from unroll.service.core import turns as slices
from unroll.service.core.clock import ManualClock
from unroll.service.core.errors import DeadlineExceeded, SessionClosed, SessionContended, UnrollError
from unroll.service.engine.engine import BatchResult, DeviceFailed, Rows, Tensors
from unroll.service.scheduler.chunk import Chunk, StepListener
from unroll.service.scheduler.limits import ModelTraits, SchedulerLimits, SessionLimits
from unroll.service.scheduler.loop import EngineThread, Loop
from unroll.service.scheduler.reply import Outcome, Reply
from unroll.service.scheduler.scheduler import Scheduler
from unroll.service.store.interface import Commit
from unroll.service.store.record import Origin, Record

NUMBER = TensorSpec("x", "float32", (), True)


class GatedEngine:
    """Adds one to each input; a batch waits until the gate is open."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        self._began = threading.Event()

    async def began(self) -> None:
        """Wait until a batch runs."""
        assert await asyncio.to_thread(self._began.wait, PATIENCE)

    def run(self, rows: Rows) -> tuple[Tensors, dict[int, UnrollError]]:
        self.batches.append(len(rows.lens))
        self._began.set()
        assert self.gate.wait(PATIENCE)
        return (rows.inputs[0] + 1,), {}

    def launch(self, rows: Rows) -> None: ...

    def close(self) -> None: ...

    def read(self, slot: int) -> np.ndarray:
        return np.zeros(1, np.float32)

    def read_rows(self, slots: Sequence[int]) -> np.ndarray:
        return np.zeros((len(slots), 1), np.float32)

    def write(self, slot: int, row: np.ndarray) -> None: ...

    def copy(self, source: int, target: int) -> None: ...


class Listener:
    """Of a joined step."""

    patient = False

    def __init__(self) -> None:
        self.position: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def write(self, outputs: Tensors) -> Sequence[Any]:
        return outputs[0]

    def complete(self, written: Any, position: int) -> None:
        self.position.set_result(position)

    def fail(self, error: UnrollError) -> None:
        self.position.set_exception(error)


class LaunchingEngine(GatedEngine):
    """Launches batches; each result becomes available once the test releases it."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: Exception | None = None
        self.done = threading.Semaphore(0)
        self.log: list[str] = []
        self._launches: asyncio.Queue[int] = asyncio.Queue()

    async def launched(self) -> None:
        """Wait for the next launch."""
        await self._launches.get()

    def launch(self, rows: Rows) -> Callable[[], BatchResult]:  # type: ignore[override]
        if self.fails is not None:
            raise self.fails
        number, answer = len(self.batches), self.run(rows)
        self.log.append(f"launch {number}")
        self._launches.put_nowait(number)

        def result() -> BatchResult:
            assert self.done.acquire(timeout=PATIENCE)
            self.log.append(f"result {number}")
            return answer

        return result


class GatedStore(MemoryStore):
    """Commits on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.committing = asyncio.Event()

    async def commit(self, commits: Sequence[Commit]) -> list[UnrollError | None]:
        self.committing.set()
        await self.gate.wait()
        return await super().commit(commits)


@asynccontextmanager
async def running(
    seconds_per_step: float = 1e-1, make: Callable[[], GatedEngine] = GatedEngine
) -> AsyncIterator[tuple[Loop, GatedStore, ManualClock, GatedEngine]]:
    clock, engine = ManualClock(), make()
    scheduler = Scheduler(ModelTraits((NUMBER,), (NUMBER,), True, True), SessionLimits(8), SchedulerLimits())
    store = GatedStore()
    with ThreadPoolExecutor(1) as executor:
        thread = EngineThread(engine, executor, lambda rows, steps: rows * steps * seconds_per_step)
        loop = Loop("m", scheduler, thread, store, clock)
        task = asyncio.create_task(loop.run())
        try:
            yield loop, store, clock, engine
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def answered(begin: Callable[[Callable[[Any], None]], Callable[[], None]]) -> Any:
    """Await the answer as a client does; cancelling stands for a disconnect."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def then(outcome: Any) -> None:
        if isinstance(outcome, UnrollError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    leave = begin(then)
    try:
        return await future
    except asyncio.CancelledError:
        leave()
        raise


async def sequences(loop: Loop, timeout: float) -> list[Reply]:
    return await answered(lambda then: loop.submit_sequences([X], timeout, then))


async def steps(loop: Loop, session_id: str, inputs: Tensors, timeout: float, position: int | None = None) -> Reply:
    def begin(then: Callable[[Outcome], None]) -> Callable[[], None]:
        session = loop.scheduler.sessions.find_detached(session_id, loop.clock.now())
        chunk = loop.submit(Chunk(inputs, session, position), timeout, then)
        return lambda: None if chunk is None else loop.leave(chunk, then)

    return await answered(begin)


X = (np.array([1.0, 2.0], np.float32),)


ORIGIN = Origin("00" * 32, "stored", b"b" * 16)


@pytest.mark.parametrize("seconds_per_step", [0.0, 1e-1], ids=["inline", "thread"])
async def test_no_reply_leaves_before_its_commit(seconds_per_step: float):
    async with running(seconds_per_step) as (loop, store, _, engine):
        engine.gate.set()
        loop.scheduler.open("a", 0, origin=ORIGIN)
        waiting = asyncio.create_task(steps(loop, "a", X, 10, position=0))
        await store.committing.wait()
        assert (await sequences(loop, 10))[0].position == 2, "work without a commit must not wait for commits"
        assert not waiting.done()
        assert loop.scheduler.sessions.find_detached("a", 0).position == 0, (
            "a step that is not in the store must not be visible"
        )
        store.gate.set()
        assert (await waiting).outputs[0].tolist() == [2.0, 3.0]
        assert loop.scheduler.sessions.find_detached("a", 0).position == 2


async def test_copy_of_a_session_that_moves_often_is_compared_with_the_store_before_a_step_runs():
    async with running() as (loop, store, _, engine):
        engine.gate.set()
        store.gate.set()
        loop.scheduler.open("a", 0, origin=ORIGIN)
        await steps(loop, "a", X, 10)

        async def step_elsewhere(position: int) -> None:
            record = await store.load(("m", "a"))
            assert isinstance(record, Record)
            new = replace(record, position=position, kept=()).packed()
            assert await store.commit([Commit(("m", "a"), record.token, b"%016d" % position, new)]) == [None]

        await step_elsewhere(5)
        with pytest.raises(SessionContended):
            await steps(loop, "a", X, 10)
        session, one = loop.scheduler.sessions.find_detached("a", 0), X[0][:1]

        async def joined(join: Callable[[StepListener], bool]) -> int:
            listener = Listener()
            assert join(listener)
            return await listener.position

        for run in (
            lambda: joined(lambda listener: loop.join(session, None, one.tobytes(), 10, listener)),
            lambda: joined(lambda listener: loop.join_chunk(Chunk((one,), session), 10, listener)),
        ):
            before = session.position
            await step_elsewhere(before + 10)
            assert await run() == before + 11
        await step_elsewhere(40)
        assert (await steps(loop, "a", X, 10)).position == 42
        assert len(engine.batches) == 5, "one of them was refused"


async def test_work_that_arrives_during_a_batch_forms_the_next():
    async with running() as (loop, _, _, engine):
        first = asyncio.create_task(sequences(loop, 10))
        await engine.began()
        others = [asyncio.create_task(sequences(loop, 10)) for _ in range(5)]
        await turns()
        engine.gate.set()
        await asyncio.gather(first, *others)
        assert engine.batches == [1, 5]


async def test_cancelled_caller_drops_its_queued_work():
    async with running() as (loop, _, _, engine):
        first = asyncio.create_task(sequences(loop, 10))
        await engine.began()
        leaving = asyncio.create_task(sequences(loop, 10))
        await turns()
        leaving.cancel()
        engine.gate.set()
        await first
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert (loop.scheduler.in_flight, engine.batches) == (0, [1])
        assert loop.scheduler.counters.failed == {"cancelled": 1}


async def test_a_retry_that_joined_keeps_the_work_alive():
    async with running() as (loop, _, _, engine):
        loop.scheduler.open("a", 0)
        blocker = asyncio.create_task(sequences(loop, 10))
        await engine.began()
        first = asyncio.create_task(steps(loop, "a", X, 10, position=0))
        retry = asyncio.create_task(steps(loop, "a", X, 10, position=0))
        await turns()
        first.cancel()
        await turns()
        engine.gate.set()
        await blocker
        assert (await retry).position == 2
        assert engine.batches == [1, 1]


async def test_errors_reach_the_caller():
    async with running() as (loop, _, clock, engine):
        blocker = asyncio.create_task(sequences(loop, 10))
        await engine.began()
        session = loop.scheduler.open("a", 0)
        late = asyncio.create_task(sequences(loop, 5))
        closed = asyncio.create_task(steps(loop, "a", X, 10))
        await turns()
        clock.advance(6)
        loop.scheduler.close(session, clock.now())
        engine.gate.set()
        await blocker
        with pytest.raises(DeadlineExceeded):
            await late
        with pytest.raises(SessionClosed):
            await closed


async def test_an_action_waits_for_the_chunks_before_it():
    async with running() as (loop, _, _, engine):
        session = loop.scheduler.open("a", 0)
        step = asyncio.create_task(steps(loop, "a", X, 10))
        await engine.began()
        acting = loop.act(session, lambda session: session.position)
        await turns()
        assert not acting.done()
        engine.gate.set()
        await step
        assert await acting == 2


async def test_the_next_batch_is_launched_before_the_last_is_answered():
    async with running(1e-1, LaunchingEngine) as (loop, _, _, engine):
        assert isinstance(engine, LaunchingEngine)
        engine.gate.set()
        first = asyncio.create_task(sequences(loop, 10))
        await engine.launched()
        second = asyncio.create_task(sequences(loop, 10))
        await engine.launched()
        assert engine.log == ["launch 0", "launch 1"]
        assert not first.done()
        engine.done.release(2)
        assert (await first)[0].outputs[0].tolist() == (await second)[0].outputs[0].tolist() == [2.0, 3.0]
        assert engine.log == ["launch 0", "launch 1", "result 0", "result 1"]
        assert loop.scheduler.in_flight == 0


async def test_session_is_in_at_most_one_launched_batch():
    async with running(0.0, LaunchingEngine) as (loop, _, _, engine):
        assert isinstance(engine, LaunchingEngine)
        engine.gate.set()
        engine.done.release(2)
        loop.scheduler.open("a", 0)
        one, two = await asyncio.gather(steps(loop, "a", X, 10), steps(loop, "a", X, 10))
        assert (one.position, two.position) == (2, 4)
        assert engine.log == ["launch 0", "result 0", "launch 1", "result 1"]


async def test_a_device_that_fails_ends_the_loop():
    engine = LaunchingEngine()
    engine.fails = DeviceFailed("it has fallen off the bus")
    scheduler = Scheduler(ModelTraits((NUMBER,), (NUMBER,), True, True), SessionLimits(8), SchedulerLimits())
    with ThreadPoolExecutor(1) as executor:
        thread = EngineThread(engine, executor, lambda rows, steps: 0.0)
        loop = Loop("m", scheduler, thread, None, ManualClock())
        task = asyncio.create_task(loop.run())
        waiting = asyncio.create_task(sequences(loop, 10))
        with pytest.raises(DeviceFailed, match="off the bus"):
            await task
        waiting.cancel()


@pytest.mark.parametrize(("seconds", "pause"), [(0.001, 0.0), (0.015, 0.001)])
async def test_after_a_long_slice_the_next_waits_longer(
    monkeypatch: pytest.MonkeyPatch, seconds: float, pause: float
) -> None:
    loop, clock, timers, ran = asyncio.get_running_loop(), [0.0], list[float](), list[str]()
    monkeypatch.setattr(slices, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(loop, "call_later", lambda delay, run: timers.append(delay) or loop.call_soon(run))
    queue = slices.Turns()

    def first() -> None:
        clock[0] += seconds
        ran.append("first")
        raise ValueError("of a slice")

    failures: list[object] = []
    loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
    queue.call(first)
    queue.call(lambda: ran.append("second"))
    await turns(4)
    assert ran == ["first", "second"]
    assert timers == ([pause] if pause else [])
    assert len(failures) == 1, "a slice that fails does not stop the others"
