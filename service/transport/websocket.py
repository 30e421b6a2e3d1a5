"""uvicorn's WebSocket protocol, which passes messages directly to a stream: no queue, no task per message."""

import asyncio
import struct
from collections.abc import Callable, Generator
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, apply_mask  # type: ignore[attr-defined]  # the compiled one, if it is there
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.streams import StreamReader

from unroll.service.core import failpoints

# RFC 6455, 5.2: the first byte of a complete message; the second byte's codes for the payload length.
_FIN_TEXT, _FIN_BINARY = 0x81, 0x82
_MASKED, _TWO_BYTES, _EIGHT_BYTES = 0x80, 126, 127
#: Bytes of a masked frame without payload.
_MIN_MASKED_BYTES = 6

#: The extension in a connection's scope that holds its `DirectLink`.
EXTENSION = "unroll.stream"


class DirectLink:
    """The `Link` that a stream uses instead of ASGI's messages, once the application has accepted the connection."""

    def __init__(self, protocol: "StreamProtocol") -> None:
        self._protocol = protocol
        self.closed: asyncio.Future[None] = protocol.loop.create_future()
        self.on_text: Callable[[bytes], None] | None = None
        self.on_binary: Callable[[bytes], None] | None = None
        self.on_writable: Callable[[bool], None] = lambda writable: None

    def attach(
        self,
        on_text: Callable[[bytes], None],
        on_binary: Callable[[bytes], None],
        on_writable: Callable[[bool], None],
    ) -> None:
        """Deliver messages by calls from now on, earlier ones included. `closed`: no more messages will arrive."""
        self.on_text, self.on_binary, self.on_writable = on_text, on_binary, on_writable
        self._protocol.hand_over(on_text, on_binary)

    def send_binary(self, message: bytes) -> None:
        self._protocol.send_message(message, text=False)

    def send_text(self, message: bytes) -> None:
        self._protocol.send_message(message, text=True)

    def pause(self) -> None:
        """Stop reading until `resume`."""
        self._protocol.transport.pause_reading()

    def resume(self) -> None:
        self._protocol.transport.resume_reading()

    def unsent(self) -> int:
        """Bytes written that the client has not taken yet."""
        return self._protocol.transport.get_write_buffer_size()

    def close(self, code: int, reason: str) -> None:
        """Send no more; discard later messages of the client."""
        self._protocol.send_close(code, reason)

    def abort(self) -> None:
        """Abort the connection."""
        self._protocol.transport.abort()

    def end(self) -> None:
        """No more messages will arrive."""
        if not self.closed.done():
            self.closed.set_result(None)


class _Reader(StreamReader):
    """between_frames: the library's parser waits for the first byte of a frame."""

    between_frames = False

    def at_eof(self) -> Generator[None, None, bool]:
        """The parser asks this between frames, and nowhere else."""
        self.between_frames = True
        ended = yield from super().at_eof()
        self.between_frames = False
        return ended


class _Parser(ServerProtocol):
    reader: _Reader

    def parse(self) -> Generator[None]:
        self.reader = _Reader()
        yield from super().parse()


class StreamProtocol(WebSocketsSansIOProtocol):
    """Offers its connection as a `DirectLink`, and behaves as uvicorn's protocol until that is attached."""

    conn: _Parser

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Parser(max_size=self.config.ws_max_size, logger=self.logger)
        self.conn.debug = False  # else it logs the headers
        self._direct = DirectLink(self)
        self.on_lost: Callable[[], None] = lambda: None

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.response.status_code == 101:  # the application's task has not begun to run
            self.scope["extensions"][EXTENSION] = self._direct  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        taken = self._deliver_whole_messages(data) if self._direct.on_binary is not None else 0
        if taken < len(data):
            super().data_received(data[taken:] if taken else data)
            if self.conn.handshake_exc is not None and not self.handshake_initiated:  # uvicorn looks at requests only
                self.transport.write(b"".join(self.conn.data_to_send()))
                self.transport.close()

    def _deliver_whole_messages(self, data: bytes) -> int:
        """Deliver the complete binary messages at the front of the data; returns their size in bytes.

        The library parses in a generator, byte by byte of the header, at several times the cost. It gets everything
        else: only masked, unfragmented, complete binary messages are handled here.
        """
        conn, taken = self.conn, 0
        if not conn.reader.between_frames or conn.current_size is not None:  # inside a frame, or between fragments
            return 0
        while len(data) - taken >= _MIN_MASKED_BYTES and data[taken] == _FIN_BINARY and not self.close_sent:
            size, begin = data[taken + 1] - _MASKED, taken + 6
            if size == _TWO_BYTES:
                size, begin = int.from_bytes(data[taken + 2 : taken + 4]), taken + 8
            elif size == _EIGHT_BYTES:
                size, begin = int.from_bytes(data[taken + 2 : taken + 10]), taken + 14
            end = begin + size
            if size < 0 or end > len(data) or size > self.config.ws_max_size:
                break
            taken = end
            self._direct.on_binary(apply_mask(data[begin:end], data[begin - 4 : begin]))  # type: ignore[misc]
        return taken

    def send_receive_event_to_app(self) -> None:
        direct = self._direct
        sink = direct.on_text if self.curr_msg_data_type == "text" else direct.on_binary
        if sink is None:
            super().send_receive_event_to_app()
            return
        frames, self.frames = self.frames, []
        message = frames[0] if len(frames) == 1 else b"".join(frames)
        if self.curr_msg_data_type == "text" and not _is_utf_8(message):
            self.send_close(1007, "a text message must be UTF-8")
        if not self.close_sent:
            sink(message)

    def hand_over(self, on_text: Callable[[bytes], None], on_binary: Callable[[bytes], None]) -> None:
        """Deliver the messages queued for the application to these callbacks instead."""
        while not self.queue.empty():
            event: Any = self.queue.get_nowait()
            if event["type"] == "websocket.disconnect":
                self._direct.end()
            elif (text := event.get("text")) is not None:
                on_text(text.encode())
            elif event["type"] == "websocket.receive":
                on_binary(event["bytes"])
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()

    def send_message(self, message: bytes, *, text: bool) -> None:
        if self.close_sent or self.disconnected or self.transport.is_closing():
            return
        first, size = _FIN_TEXT if text else _FIN_BINARY, len(message)
        if size < _TWO_BYTES:
            head = bytes((first, size))
        elif size < 1 << 16:
            head = struct.pack("!BBH", first, _TWO_BYTES, size)
        else:
            head = struct.pack("!BBQ", first, _EIGHT_BYTES, size)
        failpoints.reach("before_reply")
        self.transport.write(head + message)

    def send_close(self, code: int, reason: str) -> None:
        """Close after the client's answer: with unread data the kernel would reset the connection and drop outgoing
        data."""
        if self.close_sent or self.disconnected or self.transport.is_closing():
            return
        self.conn.send_close(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.transport.resume_reading()
        self.close_timer = self.loop.call_later(self.close_timeout, self.transport.close)
        self._direct.end()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and self.close_sent:
            self.handshake_complete = True  # otherwise uvicorn would report a refusal as a missing response

    def handle_close(self, event: Frame) -> None:
        super().handle_close(event)
        self._direct.end()

    def handle_parser_exception(self) -> None:
        super().handle_parser_exception()
        self._direct.end()

    def shutdown(self) -> None:
        """A stream closes itself, see `Connection.drain`; the application refuses what is no stream yet."""

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.on_lost()
        self._direct.end()

    def keepalive_timeout(self) -> None:
        """No pong came in time: the client is gone, unless its pong waits behind what this side does not read yet."""
        if self.transport.is_reading():
            super().keepalive_timeout()
        else:
            self.pong_timer = self.pending_ping_payload = None
            self.schedule_ping()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._direct.on_writable(False)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._direct.on_writable(True)


def _is_utf_8(message: bytes) -> bool:
    try:
        message.decode()
    except UnicodeDecodeError:
        return False
    return True
