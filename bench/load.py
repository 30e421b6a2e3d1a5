"""The load generator: connections that stay open, each with one request in flight, in a closed or an open loop.

It does as little as it can per request, so that it is the server that is measured: requests are built beforehand,
and of a reply only the status and the length are read. What it keeps is each client's last reply, to be compared.
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

#: Past the end of a run, how long replies may still take; also for connecting.
PATIENCE_SECONDS = 30.0
#: Part of a run's time that is spent before it, and not counted.
WARM_UP = 0.2


@dataclass(slots=True, eq=False)
class Client:
    """Sends `opening` once, and then `requests` in turn, over and over, on whatever connection it has.

    sessions: whose steps a request has, numbers of bench.inputs. weight: what one request counts for.
    unstepped: requests of the opening that are not a step. answered: replies so far, in all runs.
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
        """Of each of its sessions."""
        return self.answered - self.unstepped


@dataclass(frozen=True, slots=True)
class Measured:
    """One run. rate: per second. p50, p99: latencies in milliseconds; in an open loop from when a request was due.

    errors: replies that were not 200, and the first of them. busy: share of the time that the load generator computed.
    late: p99 in milliseconds of how long after it was due a request left, though its connection was free.
    """

    rate: float
    p50: float
    p99: float
    errors: int = 0
    first_error: str = ""
    busy: float = 0.0
    late: float = 0.0


class Connection(asyncio.Protocol):
    """A client's connection. Subclasses know what a whole reply is, and call `replied` for each."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.run: _Run | None = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.begin()

    @abstractmethod
    def begin(self) -> None:
        """Do what comes before the first request, and resolve `ready`."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(f"the server closed a connection: {exc}")

    def fail(self, why: str) -> None:
        """The whole run fails: what follows would not be what was to be measured."""
        if not self.ready.done():
            self.ready.set_exception(ConnectionError(why))
        elif self.run is not None:
            self.run.fail(why)

    def ask(self, asked: float) -> None:
        self._asked = asked
        self.transport.write(self.client.next_request())

    def replied(self, reply: list[bytes], error: str = "") -> None:
        self.client.answered += 1
        self.client.last = reply
        if self.run is None:
            self.transport.abort()
        else:
            self.run.replied(self, self._asked, error)


class _Run:
    """What the connections share meanwhile; times as of perf_counter. `done` when every request is answered."""

    def __init__(self, connections: Sequence[Connection], start: float, end: float) -> None:
        self.connections = connections
        self.start, self.end = start, end
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.latencies: list[float] = []
        self.lateness: list[float] = []
        self.errors = 0
        self.first_error = ""

    def fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(why))

    def finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def replied(self, connection: Connection, asked: float, error: str) -> None:
        now = perf_counter()
        if error:
            self.errors += 1
            self.first_error = self.first_error or error
        self.go_on(connection, asked, now)

    @abstractmethod
    def begin(self) -> None: ...

    @abstractmethod
    def go_on(self, connection: Connection, asked: float, now: float) -> None: ...


class _Closed(_Run):
    """Each connection asks again as soon as it is answered. Replies within start … end count."""

    def begin(self) -> None:
        self._busy = len(self.connections)
        for connection in self.connections:
            connection.ask(perf_counter())

    def go_on(self, connection: Connection, asked: float, now: float) -> None:
        if self.start <= now < self.end:
            self.latencies.append(now - asked)
        if now < self.end:
            connection.ask(now)
            return
        self._busy -= 1
        if not self._busy:
            self.finish()


class _Open(_Run):
    """Requests are due at a fixed rate, the connections in turn; one that is busy sends it late, which its latency
    includes. Requests due within start … end count. The loop turns without sleeping: timers are too coarse."""

    def __init__(self, connections: Sequence[Connection], start: float, end: float, rate: float) -> None:
        super().__init__(connections, start, end)
        self._interval = 1 / rate
        self._due: dict[Connection, deque[float]] = {connection: deque() for connection in connections}
        self._free = set(connections)
        self._order = cycle(connections)

    def begin(self) -> None:
        self._next = perf_counter()
        self._pace()

    def _pace(self) -> None:
        now = perf_counter()
        while self._next <= min(now, self.end):
            connection = next(self._order)
            if connection in self._free:
                self.lateness.append(now - self._next)
                self._free.discard(connection)
                connection.ask(self._next)
            else:
                self._due[connection].append(self._next)
            self._next += self._interval
        if self._next <= self.end:
            asyncio.get_running_loop().call_soon(self._pace)
        elif len(self._free) == len(self.connections):
            self.finish()

    def go_on(self, connection: Connection, asked: float, now: float) -> None:
        if asked >= self.start:
            self.latencies.append(now - asked)
        if waiting := self._due[connection]:
            connection.ask(waiting.popleft())
            return
        self._free.add(connection)
        if self._next > self.end and len(self._free) == len(self.connections):
            self.finish()


class Load:
    """One connection for each client; `async with` opens and closes them."""

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

    async def once(self) -> Measured:
        """One request of every client, all at once. `rate` means nothing here."""
        now = perf_counter()
        return await self._go(_Closed(self._connections, now, now), 0.0)

    async def run(self, seconds: float, rate: float | None = None) -> Measured:
        """Requests during a warm-up, and then for `seconds` that count; `rate`: that many a second, an open loop."""
        start = perf_counter() + seconds * WARM_UP
        if rate is None:
            return await self._go(_Closed(self._connections, start, start + seconds), seconds)
        return await self._go(_Open(self._connections, start, start + seconds, rate), seconds)

    async def _connect(self, client: Client) -> None:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: client.connect(client), HOST, self._port)
        self._connections.append(connection)
        await connection.ready

    def _close(self) -> None:
        for connection in self._connections:
            connection.run = None
            connection.transport.abort()

    async def _go(self, run: _Run, seconds: float) -> Measured:
        for connection in self._connections:
            connection.run = run
        began, computed = perf_counter(), process_time()
        with _no_garbage_collection():
            run.begin()
            await asyncio.wait_for(run.done, run.end - began + PATIENCE_SECONDS)
        for connection in self._connections:
            connection.run = None
        busy = (process_time() - computed) / (perf_counter() - began)
        p50, p99 = np.percentile(run.latencies, [50, 99]) * 1e3 if run.latencies else (0.0, 0.0)
        late = float(np.percentile(run.lateness, 99)) * 1e3 if run.lateness else 0.0
        rate = len(run.latencies) / seconds * self._clients[0].weight if seconds else 0.0
        return Measured(rate, float(p50), float(p99), run.errors, run.first_error, busy, late)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A pause of ours would be the server's latency."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
