"""A client of two replicas: one request in flight, which takes the connection to one of them, or to the other."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from bench.http_client import HttpConnection
from bench.load import Client
from bench.servers import HOST


def wandering_client(
    requests: Sequence[bytes], session: int, opening: Sequence[bytes], port: int, elsewhere: Callable[[], bool]
) -> Client:
    """It connects to its own replica and to that on `port`, and sends each request there if `elsewhere` says so."""
    return Client(partial(_Wandering, port, elsewhere), requests, (session,), opening, unstepped=1)


class _Wandering(HttpConnection):
    def __init__(self, port: int, elsewhere: Callable[[], bool], client: Client) -> None:
        super().__init__(client)
        self._port, self._elsewhere = port, elsewhere

    def begin(self) -> None:
        self._twin = _Twin(self)
        loop = asyncio.get_running_loop()
        self._connecting = loop.create_task(loop.create_connection(lambda: self._twin, HOST, self._port))
        self._connecting.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task) -> None:
        if error := task.exception():
            self.fail(f"no connection to the other replica: {error}")
        else:
            super().begin()

    def ask(self, asked: float) -> None:
        self._asked = asked
        transport = self._twin.transport if self._elsewhere() else self.transport
        transport.write(self.client.next_request())

    def connection_lost(self, exc: Exception | None) -> None:
        self._twin.transport.abort()
        super().connection_lost(exc)


class _Twin(HttpConnection):
    """The other connection: its replies and failures are those of the first."""

    def __init__(self, first: _Wandering) -> None:
        super().__init__(first.client)
        self._first = first

    def replied(self, reply: list[bytes], error: str = "") -> None:
        self._first.replied(reply, error)

    def fail(self, why: str) -> None:
        self._first.fail(why)
