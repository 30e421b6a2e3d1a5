"""uvicorn's server with a graceful shutdown: accepted requests are answered, and streams report their sessions.

SIGTERM  not ready, no new sessions; replies carry `Connection: close`
delay    gives load balancers time to notice
then     no new connections; idle ones are closed, busy ones and streams once everything is answered
timeout  the remaining clients are disconnected
finally  the application's lifespan ends: see `service/app.py`
"""

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType

import structlog
import uvicorn

from unroll.service.api.app_state import AppState

_log = structlog.get_logger(__name__)

#: A second signal within this time is taken for the first one, forwarded by a supervisor.
_ECHO_SECONDS = 0.5
#: Poll interval for the end of the delay and of the connections.
_LOOK_SECONDS = 0.02


#: The config and the listening sockets of the operator's port.
OperatorPort = tuple[uvicorn.Config, Sequence[socket.socket]]


class DrainingServer(uvicorn.Server):
    """delay, timeout: seconds, see above; a second signal ends both. on_started: called when the server listens."""

    def __init__(
        self,
        config: uvicorn.Config,
        state: AppState,
        delay: float = 0.0,
        timeout: float = 10.0,
        on_started: Callable[[], None] | None = None,
        operator: OperatorPort | None = None,
    ) -> None:
        super().__init__(config)
        self._operator = operator
        self._on_started = on_started
        self._unroll = state
        self._delay = delay
        self._timeout = timeout
        self._signalled = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the drain; a second signal forces the exit. May be called while the server starts."""
        if not self.should_exit:
            self._signalled = time.monotonic()
            self.should_exit = True
            self._unroll.drain()
        elif time.monotonic() - self._signalled > _ECHO_SECONDS:
            self.force_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._operator is not None:
            await self._listen_for_operator(*self._operator)
        if self._on_started is not None:
            self._on_started()

    async def _listen_for_operator(self, config: uvicorn.Config, listeners: Sequence[socket.socket]) -> None:
        config.load()
        loop = asyncio.get_running_loop()
        of_all = {"config": config, "server_state": self.server_state, "app_state": self.lifespan.state}
        protocol = partial(config.http_protocol_class, **of_all)
        for listener in listeners:
            listen = loop.create_unix_server if listener.family == socket.AF_UNIX else loop.create_server
            self.servers.append(await listen(protocol, sock=listener, ssl=config.ssl))

    def _log_started_message(self, listeners: Sequence[socket.SocketType]) -> None:
        self.config.ssl = getattr(self.config.http, "tls", None)  # for the message only
        super()._log_started_message(listeners)

    async def main_loop(self) -> None:
        await super().main_loop()
        if self._delay and not self._unroll.crashed:
            _log.info("not ready", delay=self._delay)
            await self._wait(lambda: False, self._delay)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._unroll.drain()
        _log.info("draining", connections=len(self.server_state.connections), streams=len(self._unroll.streams))
        for listener in (*self.servers, *(sockets or ())):
            listener.close()
        for connection in [*self.server_state.connections]:
            connection.shutdown()
        for stream in [*self._unroll.streams]:
            stream.drain()
        await self._wait(self._nothing_left, 0 if self._unroll.crashed else self._timeout)
        await self._cut()
        await self.lifespan.shutdown()
        self._unroll.failed |= self.lifespan.should_exit or self.lifespan.error_occurred

    def _nothing_left(self) -> bool:
        return not (self.server_state.connections or self.server_state.tasks or self._unroll.in_flight)

    async def _wait(self, over: Callable[[], bool], seconds: float) -> None:
        """Wait until `over()`, the time limit, or a second signal, but at least one poll, so that goodbyes are sent."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        await asyncio.sleep(_LOOK_SECONDS)
        while not over() and not self.force_exit and loop.time() < end:  # noqa: ASYNC110 many things may end it
            await asyncio.sleep(_LOOK_SECONDS)

    async def _cut(self) -> None:
        """Disconnect the remaining clients, and cancel the requests of disconnected ones."""
        connections, tasks = [*self.server_state.connections], [*self.server_state.tasks]
        if connections or tasks:
            _log.warning("disconnecting clients", connections=len(connections), requests=self._unroll.in_flight)
        for connection in connections:
            connection.transport.abort()
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=_LOOK_SECONDS)
            for task in pending:
                task.cancel()
