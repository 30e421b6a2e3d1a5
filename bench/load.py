"""The load generator: persistent connections with one request in flight each, in a closed or an open loop.

It does as little as possible per request, so that the server is the limit: requests are built in advance, and only the
status and the length of a reply are read. The last reply of each client is kept for comparison.
"""

import asyncio
import gc
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, cycle
from time import perf_counter, process_time
from types import TracebackType
from typing import Self, cast

import numpy as np

from bench.servers import HOST

#: Limit for replies after the end of a run, and for connecting.
PATIENCE_SECONDS = 30.0
#: Length of the warm-up, which does not count, as a share of the run.
WARM_UP = 0.2


@dataclass(slots=True, eq=False)
class Client:
    """Sends `opening` once, then `requests` cyclically, on its current connection.

    Attributes:
        sessions: numbers (see bench.inputs) of the sessions that step in each request.
        weight: the count of one request in the rate.
        unstepped: opening requests that are not steps.
        answered: replies so far, over all runs.
        last: the last reply: one body, or the messages of a WebSocket.
    """

    connect: Callable[["Client"], "Connection"]
    requests: Sequence[bytes]
    sessions: Sequence[int] = ()
    opening: Sequence[bytes] = ()
    unstepped: int = 0
    weight: int = 1
    answered: int = 0
    last: list[bytes] = field(default_factory=list)
    next_request: Callable[[], bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.next_request = chain(self.opening, cycle(self.requests)).__next__

    @property
    def steps(self) -> int:
        """The number of steps so far of each session."""
        return self.answered - self.unstepped


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurement of one run.

    Attributes:
        rate: rate per second.
        p50, p99: latencies in milliseconds; in an open loop, from the time a request was due.
        errors, first_error: replies that were not 2xx.
        busy: the load generator's own processor time, as a share of the run.
        late: p99, in milliseconds, of the delay of due requests on an idle connection.
    """

    rate: float
    p50: float
    p99: float
    errors: int = 0
    first_error: str = ""
    busy: float = 0.0
    late: float = 0.0


def repeated(call: Callable[[], object], seconds: float, weight: int = 1) -> Measurement:
    """Call repeatedly for a time; `weight` is the count of one call."""
    taken = []
    began = now = perf_counter()
    while now < began + seconds:
        call()
        before, now = now, perf_counter()
        taken.append(now - before)
    p50, p99 = np.percentile(taken, [50, 99]) * 1e3
    return Measurement(len(taken) * weight / (now - began), float(p50), float(p99))


class Connection(asyncio.Protocol):
    """A client's connection. A subclass recognises whole replies and calls `replied` for each."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.run: _LoadRun | None = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.begin()

    @abstractmethod
    def begin(self) -> None:
        """Prepare for the first request, then resolve `ready`."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(f"the server closed a connection: {exc}")

    def fail(self, reason: str) -> None:
        """Fail the whole run, since its load would not be the requested one."""
        if not self.ready.done():
            self.ready.set_exception(ConnectionError(reason))
        elif self.run is not None:
            self.run.fail(reason)

    def send(self, due: float) -> None:
        """Send the next request; its latency counts from `due`."""
        self._due = due
        self.transport.write(self.client.next_request())

    def replied(self, reply: list[bytes], error: str = "") -> None:
        self.client.answered += 1
        self.client.last = reply
        if self.run is None:
            self.transport.abort()
        else:
            self.run.replied(self, self._due, error)


class _LoadRun:
    """State shared by the connections of a run; times are perf_counter's. `done`: every request is answered."""

    def __init__(self, connections: Sequence[Connection], start: float, end: float) -> None:
        self.connections = connections
        self.start, self.end = start, end
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.latencies: list[float] = []
        self.lateness: list[float] = []
        self.errors = 0
        self.first_error = ""

    def fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(reason))

    def finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def replied(self, connection: Connection, due: float, error: str) -> None:
        now = perf_counter()
        if error:
            self.errors += 1
            self.first_error = self.first_error or error
        self.on_reply(connection, due, now)

    @abstractmethod
    def begin(self) -> None: ...

    @abstractmethod
    def on_reply(self, connection: Connection, due: float, now: float) -> None: ...


class _ClosedLoop(_LoadRun):
    """Each connection sends its next request when it is answered. Replies within start … end count."""

    def begin(self) -> None:
        self._busy = len(self.connections)
        for connection in self.connections:
            connection.send(perf_counter())

    def on_reply(self, connection: Connection, due: float, now: float) -> None:
        if self.start <= now < self.end:
            self.latencies.append(now - due)
        if now < self.end:
            connection.send(now)
            return
        self._busy -= 1
        if not self._busy:
            self.finish()


class _OpenLoop(_LoadRun):
    """Requests are due at a fixed rate, on the connections in turn; a busy connection sends late, and the latency
    includes the delay. Requests due within start … end count. The loop never sleeps: timers are too coarse."""

    def __init__(self, connections: Sequence[Connection], start: float, end: float, rate: float) -> None:
        super().__init__(connections, start, end)
        self._interval = 1 / rate
        self._overdue: dict[Connection, deque[float]] = {connection: deque() for connection in connections}
        self._idle = set(connections)
        self._round_robin = cycle(connections)

    def begin(self) -> None:
        self._next_due = perf_counter()
        self._pace()

    def _pace(self) -> None:
        now = perf_counter()
        while self._next_due <= min(now, self.end):
            connection = next(self._round_robin)
            if connection in self._idle:
                self.lateness.append(now - self._next_due)
                self._idle.discard(connection)
                connection.send(self._next_due)
            else:
                self._overdue[connection].append(self._next_due)
            self._next_due += self._interval
        if self._next_due <= self.end:
            asyncio.get_running_loop().call_soon(self._pace)
        elif len(self._idle) == len(self.connections):
            self.finish()

    def on_reply(self, connection: Connection, due: float, now: float) -> None:
        if due >= self.start:
            self.latencies.append(now - due)
        if waiting := self._overdue[connection]:
            connection.send(waiting.popleft())
            return
        self._idle.add(connection)
        if self._next_due > self.end and len(self._idle) == len(self.connections):
            self.finish()


class Load:
    """One connection for each client, opened and closed by `async with`."""

    def __init__(self, port: int, clients: Sequence[Client]) -> None:
        self._port = port
        self._clients = clients
        self._connections: list[Connection] = []

    async def __aenter__(self) -> Self:
        try:
            for client in self._clients:
                await asyncio.wait_for(self._connect(client), PATIENCE_SECONDS)
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._close()
        await asyncio.sleep(0)

    async def run_once(self) -> Measurement:
        """One request of every client, all at the same time. The result has no `rate`."""
        now = perf_counter()
        return await self._execute(_ClosedLoop(self._connections, now, now), 0.0)

    async def run(self, seconds: float, rate: float | None = None) -> Measurement:
        """Send requests during a warm-up, then for the measured `seconds`; with a `rate` per second in an open loop."""
        start = perf_counter() + seconds * WARM_UP
        if rate is None:
            return await self._execute(_ClosedLoop(self._connections, start, start + seconds), seconds)
        return await self._execute(_OpenLoop(self._connections, start, start + seconds, rate), seconds)

    async def _connect(self, client: Client) -> None:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: client.connect(client), HOST, self._port)
        self._connections.append(connection)
        await connection.ready

    def _close(self) -> None:
        for connection in self._connections:
            connection.run = None
            connection.transport.abort()

    async def _execute(self, run: _LoadRun, seconds: float) -> Measurement:
        for connection in self._connections:
            connection.run = run
        began, computed = perf_counter(), process_time()
        with _garbage_collection_off():
            run.begin()
            await asyncio.wait_for(run.done, run.end - began + PATIENCE_SECONDS)
        for connection in self._connections:
            connection.run = None
        busy = (process_time() - computed) / (perf_counter() - began)
        p50, p99 = np.percentile(run.latencies, [50, 99]) * 1e3 if run.latencies else (0.0, 0.0)
        late = float(np.percentile(run.lateness, 99)) * 1e3 if run.lateness else 0.0
        rate = len(run.latencies) / seconds * self._clients[0].weight if seconds else 0.0
        return Measurement(rate, float(p50), float(p99), run.errors, run.first_error, busy, late)


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """A pause of the load generator would count as the server's latency."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
