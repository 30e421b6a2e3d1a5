"""A TCP proxy that injects network faults: cut connections, lost replies, delays and silence.

It sits between client and replica, or between replica and Redis. Each piece of data from the client gets a fault.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum, auto
from types import TracebackType
from typing import Self


class Fault(StrEnum):
    NONE = auto()
    CUT_REQUEST = auto()  # half of the piece arrives
    LOSE_REPLY = auto()  # it arrives and is answered; the connection is cut before the reply
    CUT_REPLY = auto()  # half of the reply arrives
    DELAY = auto()  # it arrives late
    SILENCE = auto()  # it and everything after it are dropped


#: Faults that end a connection immediately.
CUTS = (Fault.CUT_REQUEST, Fault.LOSE_REPLY, Fault.CUT_REPLY)


class FaultProxy:
    """A proxy in front of the port `target`.

    Args:
        draw: Returns the fault of the next piece. It may be replaced at any time.
        delay: Seconds by which late replies are delayed.
        spares_first: Whether the first piece of each connection, such as a handshake, gets through.
    """

    def __init__(
        self,
        target: int,
        draw: Callable[[], Fault] = lambda: Fault.NONE,
        delay: float = 0.1,
        *,
        spares_first: bool = False,
    ) -> None:
        self.target, self.draw, self.delay, self.spares_first = target, draw, delay, spares_first
        self.port = 0  # any free port; later calls of `accept` reuse it
        self._serving: dict[asyncio.Task[None], _Pair] = {}

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        await self.refuse()

    async def accept(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Cut every connection and refuse new ones until the next `accept`."""
        self._server.close()
        self.cut()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def cut(self) -> None:
        """Cut every open connection."""
        for pair in self._serving.values():
            pair.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        pair = self._serving[task] = _Pair(self, (reader, writer), there)
        try:
            await pair.run()
        finally:
            del self._serving[task]


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Pair:
    """A client's connection and the matching upstream connection."""

    def __init__(self, proxy: FaultProxy, here: Ends, there: Ends) -> None:
        self._proxy = proxy
        self._here, self._there = here, there
        self._fault = Fault.NONE

    async def run(self) -> None:
        pumps = [asyncio.create_task(self._requests()), asyncio.create_task(self._replies())]
        with suppress(OSError):
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        self.cut()
        await asyncio.gather(*pumps, return_exceptions=True)

    def cut(self) -> None:
        for _, writer in (self._here, self._there):
            writer.transport.abort()

    async def _requests(self) -> None:
        spared = self._proxy.spares_first
        while piece := await self._here[0].read(65536):
            if self._fault is not Fault.SILENCE and not spared:
                self._fault = self._proxy.draw()
            spared = False
            match self._fault:
                case Fault.CUT_REQUEST:
                    self._there[1].write(piece[: len(piece) // 2])
                    with suppress(OSError):
                        await self._there[1].drain()
                    return
                case Fault.SILENCE:
                    continue
                case Fault.DELAY:
                    await asyncio.sleep(self._proxy.delay)
            self._there[1].write(piece)

    async def _replies(self) -> None:
        while piece := await self._there[0].read(65536):
            match self._fault:
                case Fault.LOSE_REPLY:
                    return
                case Fault.CUT_REPLY:
                    self._here[1].write(piece[: len(piece) // 2])
                    with suppress(OSError):
                        await self._here[1].drain()
                    return
                case Fault.SILENCE:
                    continue
            self._here[1].write(piece)
