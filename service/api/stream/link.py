"""A connection as a stream uses it, and the adapter that makes one of any ASGI server's WebSocket."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect

#: Bytes written and not yet sent, above which an ASGI client counts as not reading, and below which it reads again.
_HIGH_WATER, _LOW_WATER = 65_536, 16_384

OnMessage = Callable[[bytes], None]
OnWritable = Callable[[bool], None]


class Link(Protocol):
    """An accepted connection, of any server. closed: done when there will be no more messages."""

    closed: asyncio.Future[None]
    tenant: str

    def attach(self, on_text: OnMessage, on_binary: OnMessage, on_writable: OnWritable) -> None:
        """Call these for each message, and when the client stops reading or reads again."""

    def send_binary(self, message: bytes) -> None: ...
    def send_text(self, message: bytes) -> None: ...
    def pause(self) -> None:
        """Stop reading."""

    def resume(self) -> None:
        """Read again."""

    def unsent(self) -> int:
        """Bytes that were sent here and that the client has not taken."""

    def close(self, code: int, reason: str) -> None:
        """Close the connection when everything sent here has left. What the client still sends is discarded."""

    def abort(self) -> None:
        """Cut the connection; what is unsent is lost."""


class AsgiLink:
    """A link over ASGI's `receive` and `send`. A transport that offers `unroll.stream` works without the queue."""

    closed: asyncio.Future[None]
    tenant = ""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._outgoing: deque[tuple[dict[str, Any], int]] = deque()  # messages, and bytes of each
        self._unsent = 0
        self._to_write = asyncio.Event()
        self._reading = asyncio.Event()
        self._reading.set()
        self._aborted = asyncio.Event()

    def attach(self, on_text: OnMessage, on_binary: OnMessage, on_writable: OnWritable) -> None:
        self._on_text, self._on_binary, self._on_writable = on_text, on_binary, on_writable
        self.closed = asyncio.ensure_future(self._run())

    def send_binary(self, message: bytes) -> None:
        self._put({"type": "websocket.send", "bytes": message}, len(message))

    def send_text(self, message: bytes) -> None:
        self._put({"type": "websocket.send", "text": message.decode()}, len(message))

    def pause(self) -> None:
        self._reading.clear()

    def resume(self) -> None:
        self._reading.set()

    def unsent(self) -> int:
        return self._unsent

    def close(self, code: int, reason: str) -> None:
        self._put({"type": "websocket.close", "code": code, "reason": reason}, 0)

    def abort(self) -> None:
        self._aborted.set()

    async def _run(self) -> None:
        tasks = [asyncio.ensure_future(part) for part in (self._read(), self._write(), self._aborted.wait())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        for task in done:
            task.result()

    async def _read(self) -> None:
        while True:
            await self._reading.wait()
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if (content := message.get("bytes")) is not None:
                self._on_binary(content)
            else:
                self._on_text(message["text"].encode())

    async def _write(self) -> None:
        while True:
            await self._to_write.wait()
            self._to_write.clear()
            while self._outgoing:
                message, size = self._outgoing.popleft()
                try:
                    await self._websocket.send(message)
                except WebSocketDisconnect:
                    return
                if message["type"] == "websocket.close":
                    return
                before, self._unsent = self._unsent, self._unsent - size
                if before > _LOW_WATER >= self._unsent:
                    self._on_writable(True)

    def _put(self, message: dict[str, Any], size: int) -> None:
        self._outgoing.append((message, size))
        self._to_write.set()
        before, self._unsent = self._unsent, self._unsent + size
        if before <= _HIGH_WATER < self._unsent:
            self._on_writable(False)
