"""Exchanges with a store: concurrent calls are sent together, and are answered even if the store never does."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog

from unroll.service.core.errors import SessionContended, StoreUnavailable, UnrollError
from unroll.service.telemetry.metrics import StoreFigures

C = TypeVar("C")

_log = structlog.get_logger(__name__)

#: Checks for overdue answers per timeout.
_TICKS = 10
#: Seconds after which a client should retry.
_RETRY_AFTER = 1.0


@dataclass(slots=True)
class _Exchange(Generic[C]):
    """asked: calls with the future of their replies; empty once answered. ticks: since the start."""

    asked: list[tuple[list[C], asyncio.Future[list[Any]]]]
    ticks: int = 0


class Exchanges(Generic[C]):
    """Groups the calls of a store into exchanges. While `most` exchanges are running, further calls wait for the next.

    Args:
        execute: Performs calls. Returns a reply or an exception per call; raises if there are no replies.
        failures: Exceptions of `execute` if the store is unavailable. Any other is logged with a traceback.
        timeout: Seconds without an answer after which calls fail.
        most: Maximum number of concurrent exchanges.
        cancels: Whether to cancel a late exchange. If not, it keeps running until it ends.
    """

    def __init__(
        self,
        execute: Callable[[list[C]], Awaitable[list[Any]]],
        failures: tuple[type[Exception], ...],
        timeout: float,
        *,
        most: int,
        cancels: bool,
    ) -> None:
        self._execute = execute
        self._failures = failures
        self._timeout = timeout
        self._most = most
        self._cancels = cancels
        self._queue: list[tuple[list[C], asyncio.Future[list[Any]]]] = []
        self._under_way: dict[asyncio.Task[None], _Exchange[C]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.figures = StoreFigures()

    def __repr__(self) -> str:
        return f"<Exchanges {len(self._under_way)} under way, {len(self._queue)} calls waiting>"

    async def ask(self, calls: list[C]) -> list[Any]:
        """A reply or an exception per call. Raises StoreUnavailable if there are none."""
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._queue.append((calls, future))
        self._send()
        return await future

    async def ask_one(self, call: C) -> Any:
        """The reply to one call. Raises StoreUnavailable, or the reply if it is an error."""
        (reply,) = await self.ask([call])
        if isinstance(reply, Exception):
            raise reply if isinstance(reply, UnrollError) else unavailable(reply)
        return reply

    async def counted(self, commits: int, answer: Awaitable[list[UnrollError | None]]) -> list[UnrollError | None]:
        """Await the results of commits, and count them. If the store is unavailable, that is the result of each."""
        try:
            results = await answer
        except StoreUnavailable as error:
            results = [error] * commits
        counts, stored = self.figures.commits, results.count(None)
        counts["stored"] += stored
        if stored < len(results):
            contended = sum(isinstance(result, SessionContended) for result in results)
            counts["contended"] += contended
            counts["unavailable"] += len(results) - stored - contended
        return results

    async def finish(self) -> None:
        while self._under_way:
            await asyncio.wait(self._under_way)

    def note(self, reason: Exception | None) -> None:
        """Log a change in whether the store answers. reason: why it does not, or None."""
        if self.figures.up is not (reason is None):
            self.figures.up = reason is None
            (_log.info if reason is None else _log.error)("store", answers=self.figures.up, reason=_first_line(reason))

    def _send(self) -> None:
        while self._queue and len(self._under_way) < self._most:
            exchange = _Exchange(self._queue)
            self._queue = []
            task = asyncio.create_task(self._run(exchange), name="store")
            self._under_way[task] = exchange
            task.add_done_callback(self._done)
        if self._under_way and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._timeout / _TICKS, self._tick)

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._under_way[task]
        self._send()

    def _tick(self) -> None:
        """Fail the calls that have waited too many ticks. A pause of this process, when it could not read answers,
        counts as one tick."""
        self._timer = None
        for task, exchange in self._under_way.items():
            exchange.ticks += 1
            if exchange.ticks % _TICKS == 0:
                if self._cancels:
                    task.cancel()
                else:
                    self._fail(exchange, self._late())
        self._send()

    def _late(self) -> TimeoutError:
        return TimeoutError(f"no answer within {self._timeout:g} s")

    async def _run(self, exchange: _Exchange[C]) -> None:
        calls = [call for some, _ in exchange.asked for call in some]
        begun = time.monotonic()
        try:
            replies = await self._execute(calls)
        except asyncio.CancelledError:
            self._fail(exchange, self._late())
            return
        except Exception as reason:  # noqa: BLE001 the waiting commits must be answered
            if not isinstance(reason, self._failures):
                _log.error("unexpected error of the store", exc_info=reason)
            self._fail(exchange, reason)
            return
        finally:
            self.figures.exchange_seconds.observe(time.monotonic() - begun)
        self.note(None)
        begin = 0
        for some, future in exchange.asked:
            end = begin + len(some)
            if not future.done():  # done if the caller was cancelled
                future.set_result(replies[begin:end])
            begin = end

    def _fail(self, exchange: _Exchange[C], reason: Exception) -> None:
        """Fail its calls and the waiting ones, which would fail the same way later."""
        failed, exchange.asked, self._queue = [*exchange.asked, *self._queue], [], []
        self.note(reason)
        for _, future in failed:
            if not future.done():
                future.set_exception(unavailable(reason))


def unavailable(reason: Exception) -> StoreUnavailable:
    return StoreUnavailable(f"the session store is unavailable: {_first_line(reason)}", _RETRY_AFTER)


def _first_line(reason: Exception | None) -> str:
    if reason is None:
        return ""
    silent = "no answer in time" if isinstance(reason, TimeoutError) else type(reason).__name__
    return str(reason).partition("\n")[0] or silent
