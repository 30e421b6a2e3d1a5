"""A connection until its TLS handshake is complete."""

import asyncio
from typing import Any

from unroll.service.access.certificate import Tls
from unroll.service.transport.limited import LimitedProtocol

#: Unsent bytes above which a client counts as not reading, as without TLS; parts of a long answer are smaller.
_HIGH_WATER, _PART_BYTES = 65_536, 32_768


class _InParts:
    """A TLS transport that writes long answers in parts until the client stops reading.

    TLS passes on at once what it is given while the client reads, and then counts none of it as unsent: a long answer
    in one piece would be neither held bytes nor timed.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(_HIGH_WATER)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if not self._transport.is_closing():  # a second `close` makes asyncio's transport unusable
            self._transport.close()

    def write(self, data: bytes) -> None:
        begin = 0
        while len(data) - begin > _PART_BYTES and not self._transport.get_write_buffer_size():
            self._transport.write(data[begin : begin + _PART_BYTES])
            begin += _PART_BYTES
        self._transport.write(data[begin:])


class Handshake(asyncio.Protocol):
    """A connection until its TLS handshake is complete; then an instance of `protocol` serves it.

    uvicorn's server has it in its set of connections.
    """

    protocol: type[LimitedProtocol]
    tls: Tls
    cycle = None

    def __init__(self, **kwargs: Any) -> None:
        self.transport: asyncio.Transport
        self._protocol = self.protocol(**kwargs)
        self._open = self._protocol.connections
        self._connections = self.protocol.all_connections
        self._hello = b""
        self._early: list[bytes] = []  # data that arrived with the end of the handshake
        self._since: float | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._open.add(self)  # type: ignore[arg-type]  # it has the members that the server uses
        self._connections.enter(self, transport.get_extra_info("peername")[0])

    def data_received(self, data: bytes) -> None:
        if self._hello:
            self._early.append(data)
        else:
            self._hello = data
            self.transport.pause_reading()  # until the TLS protocol is in place
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        limit = self.protocol.limits.head_timeout
        loop = asyncio.get_running_loop()
        starting = loop.start_tls(
            self.transport, self, self.tls.context(), server_side=True, ssl_handshake_timeout=limit
        )
        shaking = loop.create_task(starting)
        await asyncio.sleep(0)  # it takes the connection over
        await asyncio.sleep(0)  # and waits for the handshake
        try:
            _feed(self.transport.get_protocol(), self._hello)
            transport: Any = _InParts(await shaking)  # type: ignore[arg-type]
        except (OSError, asyncio.CancelledError):
            self.transport.abort()
            return
        finally:
            self._leave()
        if transport.is_closing():  # the client disconnected, or was closed for another
            return
        transport.set_protocol(self._protocol)
        self._protocol.connection_made(transport)
        for data in self._early:
            self._protocol.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()

    def _leave(self) -> None:
        self._open.discard(self)
        self._connections.leave(self)

    def check(self, now: float) -> None:
        """Disconnect a silent client. A handshake that has begun has its own timeout."""
        if self._since is None:
            self._since = now
        elif not self._hello and now - self._since > self.protocol.limits.head_timeout:
            self.transport.close()

    def is_idle(self) -> bool:
        return True

    def close_for_another(self) -> None:
        self.transport.abort()

    def shutdown(self) -> None:
        self.transport.abort()


def _feed(protocol: Any, data: bytes) -> None:
    while data:
        buffer = protocol.get_buffer(len(data))
        size = min(len(buffer), len(data))
        buffer[:size] = data[:size]
        protocol.buffer_updated(size)
        data = data[size:]
