"""The load generator: clients on connections that stay open, each with one request in flight.

It does as little as it can per request, so that it is the server that is measured: requests are built beforehand,
and of a reply only the status and the length are read.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Self, cast

import numpy as np

from bench.servers import HOST

#: Past the end of a run, how long replies may still take.
_PATIENCE_SECONDS = 30.0
_LENGTH = b"\r\ncontent-length:"


@dataclass(slots=True)
class Client:
    """Sends `requests` in turn, over and over. answered: replies so far, in all runs. last: the last reply's body."""

    requests: Sequence[bytes]
    answered: int = 0
    last: bytes = b""


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: requests per second, latencies in milliseconds, replies that were not 200 and the first of them."""

    rate: float
    p50: float
    p99: float
    errors: int
    first_error: str


@dataclass(slots=True)
class _Run:
    """What the connections share during a run; times as of perf_counter. Replies in start … end are counted."""

    start: float
    end: float
    busy: int
    done: asyncio.Future[None]
    latencies: list[float] = field(default_factory=list)
    errors: int = 0
    first_error: str = ""

    def fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(why))


class _Connection(asyncio.Protocol):
    def __init__(self, client: Client) -> None:
        self._client = client
        self._received = b""
        self._run: _Run | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._run is not None:
            self._run.fail(f"the server closed a connection: {exc}")

    def begin(self, run: _Run) -> None:
        self._run = run
        self._ask()

    def _ask(self) -> None:
        client = self._client
        self._asked = perf_counter()
        self.transport.write(client.requests[client.answered % len(client.requests)])

    def data_received(self, data: bytes) -> None:
        run = self._run
        if run is None:
            self.transport.abort()
            return
        if self._received:
            data = self._received + data
        head = data.find(b"\r\n\r\n")
        length = _content_length(data[: head + 2]) if head >= 0 else 0
        if head < 0 or len(data) < head + 4 + length:
            self._received = data
            return
        self._received = b""
        if length < 0 or len(data) > head + 4 + length:
            run.fail(f"not one whole reply: {data[:200]!r}")
            return
        now = perf_counter()
        self._client.answered += 1
        self._client.last = data[head + 4 :]
        if data[9:12] != b"200":
            run.errors += 1
            run.first_error = run.first_error or repr(data[:400])
        if run.start <= now < run.end:
            run.latencies.append(now - self._asked)
        if now < run.end:
            self._ask()
            return
        self._run = None
        run.busy -= 1
        if not run.busy and not run.done.done():
            run.done.set_result(None)


def _content_length(head: bytes) -> int:
    """-1 if it is not there exactly once, as digits."""
    head = head.lower()
    _, _, after = head.partition(_LENGTH)
    digits = after[: after.find(b"\r\n")].strip()
    return int(digits) if digits.isdigit() and _LENGTH not in after else -1


class Load:
    """One connection for each client; `async with` opens and closes them."""

    def __init__(self, port: int, clients: Sequence[Client]) -> None:
        self._port = port
        self._clients = clients
        self._connections: list[_Connection] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for client in self._clients:
            connect = loop.create_connection(lambda client=client: _Connection(client), HOST, self._port)  # type: ignore[misc]
            _, connection = await asyncio.wait_for(connect, _PATIENCE_SECONDS)
            self._connections.append(connection)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for connection in self._connections:
            connection.transport.abort()
        await asyncio.sleep(0)

    async def once(self) -> Measured:
        """One request of every client, all at once. `rate` and latencies mean nothing here."""
        return await self._go(perf_counter(), 0.0)

    async def run(self, seconds: float, warm_up: float) -> Measured:
        """Requests for `warm_up` seconds, and then `seconds` that count. Every request is answered at the end."""
        return await self._go(perf_counter() + warm_up, seconds)

    async def _go(self, start: float, seconds: float) -> Measured:
        done = asyncio.get_running_loop().create_future()
        run = _Run(start, start + seconds, len(self._connections), done)
        for connection in self._connections:
            connection.begin(run)
        await asyncio.wait_for(done, run.end - perf_counter() + _PATIENCE_SECONDS)
        p50, p99 = np.percentile(run.latencies, [50, 99]) * 1e3 if run.latencies else (0.0, 0.0)
        rate = len(run.latencies) / seconds if seconds else 0.0
        return Measured(rate, float(p50), float(p99), run.errors, run.first_error)
