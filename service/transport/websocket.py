"""uvicorn's WebSocket protocol, which hands the messages of a stream straight to it: no queue, no task per message."""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.http11 import Request

#: Under this name the application finds a `DirectStream` among the extensions of a connection's scope.
EXTENSION = "unroll.stream"


class DirectStream:
    """What the application may use instead of ASGI's messages, once it has accepted the connection."""

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
        """From now on each message is a call. `closed` is done when there will be no more."""
        self.on_text, self.on_binary, self.on_writable = on_text, on_binary, on_writable

    def send_binary(self, message: bytes) -> None:
        self._protocol.send_message(message, text=False)

    def send_text(self, message: bytes) -> None:
        self._protocol.send_message(message, text=True)

    def pause(self) -> None:
        """Read no more for now."""
        self._protocol.transport.pause_reading()

    def resume(self) -> None:
        self._protocol.transport.resume_reading()

    def unsent(self) -> int:
        """Bytes written that the client has not taken yet."""
        return self._protocol.transport.get_write_buffer_size()

    def abort(self) -> None:
        """Cut the connection off."""
        self._protocol.transport.abort()

    def end(self) -> None:
        """There will be no more messages."""
        if not self.closed.done():
            self.closed.set_result(None)


class StreamProtocol(WebSocketsSansIOProtocol):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._direct = DirectStream(self)

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.response.status_code == 101:  # the application's task has not begun to run
            self.scope["extensions"][EXTENSION] = self._direct  # type: ignore[assignment]

    def send_receive_event_to_app(self) -> None:
        direct = self._direct
        sink = direct.on_text if self.curr_msg_data_type == "text" else direct.on_binary
        if sink is None:
            super().send_receive_event_to_app()
            return
        frames, self.frames = self.frames, []
        if not self.close_sent:
            sink(frames[0] if len(frames) == 1 else b"".join(frames))

    def send_message(self, message: bytes, *, text: bool) -> None:
        if self.close_sent or self.disconnected or self.transport.is_closing():
            return
        if text:
            self.conn.send_text(message)
        else:
            self.conn.send_binary(message)
        self.transport.write(b"".join(self.conn.data_to_send()))

    def handle_close(self, event: Frame) -> None:
        super().handle_close(event)
        self._direct.end()

    def handle_parser_exception(self) -> None:
        super().handle_parser_exception()
        self._direct.end()

    def shutdown(self) -> None:
        super().shutdown()
        self._direct.end()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._direct.end()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._direct.on_writable(False)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._direct.on_writable(True)
