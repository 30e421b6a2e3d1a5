"""A client of two replicas, with one request in flight on either of its connections."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from bench.http_client import HttpConnection
from bench.load import Client
from bench.servers import HOST


def roaming_client(
    requests: Sequence[bytes], session: int, opening: Sequence[bytes], port: int, use_other: Callable[[], bool]
) -> Client:
    """A client connected to its own replica and to the one on `port`; `use_other()` chooses for each request."""
    return Client(partial(_RoamingConnection, port, use_other), requests, (session,), opening, unstepped=1)


class _RoamingConnection(HttpConnection):
    def __init__(self, port: int, use_other: Callable[[], bool], client: Client) -> None:
        super().__init__(client)
        self._port, self._use_other = port, use_other

    def begin(self) -> None:
        self._other = _OtherConnection(self)
        loop = asyncio.get_running_loop()
        self._connecting = loop.create_task(loop.create_connection(lambda: self._other, HOST, self._port))
        self._connecting.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task) -> None:
        if error := task.exception():
            self.fail(f"no connection to the other replica: {error}")
        else:
            super().begin()

    def send(self, due: float) -> None:
        self._due = due
        transport = self._other.transport if self._use_other() else self.transport
        transport.write(self.client.next_request())

    def connection_lost(self, exc: Exception | None) -> None:
        self._other.transport.abort()
        super().connection_lost(exc)


class _OtherConnection(HttpConnection):
    """The second connection, which reports its replies and failures to the first."""

    def __init__(self, first: _RoamingConnection) -> None:
        super().__init__(first.client)
        self._first = first

    def replied(self, reply: list[bytes], error: str = "") -> None:
        self._first.replied(reply, error)

    def fail(self, reason: str) -> None:
        self._first.fail(reason)
