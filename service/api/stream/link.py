"""The interface between a stream and its web server, and an adapter for any ASGI server."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect

#: Unsent bytes above which the client of an ASGI server counts as not reading, and below which it reads again.
_HIGH_WATER, _LOW_WATER = 65_536, 16_384

OnMessage = Callable[[bytes], None]
OnWritable = Callable[[bool], None]


class Link(Protocol):
    """A WebSocket connection. closed: done when no more messages will arrive."""

    closed: asyncio.Future[None]
    tenant: str

    def attach(self, on_text: OnMessage, on_binary: OnMessage, on_writable: OnWritable) -> None:
        """Set the callbacks for messages, and for when the client stops reading and reads again."""

    def send_binary(self, message: bytes) -> None: ...
    def send_text(self, message: bytes) -> None: ...
    def pause(self) -> None:
        """Stop reading."""

    def resume(self) -> None:
        """Resume reading."""

    def unsent(self) -> int:
        """Bytes that were sent but not yet taken by the client."""

    def close(self, code: int, reason: str) -> None:
        """Close the connection after sending everything. Further messages from the client are discarded."""

    def abort(self) -> None:
        """Drop the connection immediately, discarding unsent bytes."""


class AsgiLink:
    """A link over ASGI's `receive` and `send`. Unroll's own transport provides a link without this queue."""

    closed: asyncio.Future[None]
    tenant = ""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._outgoing: deque[tuple[dict[str, Any], int]] = deque()  # messages with their sizes in bytes
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
