"""uvicorn's WebSocket protocol, extended to pass messages directly to a stream: no queue, no task per message."""

import asyncio
import struct
from collections.abc import Callable
from time import perf_counter
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, Opcode, apply_mask  # type: ignore[attr-defined]  # the compiled one, if any
from websockets.http11 import Request
from websockets.server import ServerProtocol

from unroll.service.access.held_bytes import ANSWERS, MESSAGES, SMALL, HeldBytes, Holding
from unroll.service.api.stream.allowance import MAX_FRAGMENTS, PINGS, TOO_MUCH, TRY_AGAIN, Allowance
from unroll.service.api.stream.link import OnMessage, OnWritable
from unroll.service.core import failpoints
from unroll.service.core.turns import LONG_BYTES, Turns

# RFC 6455, 5.2: the first byte of a complete message, and its bits; the second byte's codes for the payload length.
_FIN_TEXT, _FIN_BINARY = 0x81, 0x82
_FIN, _OPCODE, _CONTROL = 0x80, 0x0F, 0x08
_MASKED, _TWO_BYTES, _EIGHT_BYTES = 0x80, 126, 127
#: Further messages wait for another turn after this many seconds since the first, or after a message of this size.
_TURN_SECONDS, _TURN_BYTES = 0.0001, 16_384
#: More bytes than this wait for their turn as soon as anything else does.
_SHORT_BYTES = 2048
#: Maximum length of a close reason.
_MAX_REASON = 120
#: Seconds for a client that violated a limit to read the reason.
_LINGER_SECONDS = 1.0

#: The extension in the ASGI scope that contains the `DirectLink`.
EXTENSION = "unroll.stream"


class DirectLink:
    """The `Link` that a stream uses instead of ASGI messages, once the application has accepted the connection."""

    def __init__(self, protocol: "StreamProtocol") -> None:
        self._protocol = protocol
        self.closed: asyncio.Future[None] = protocol.loop.create_future()
        self.tenant = ""
        self.on_text: OnMessage | None = None
        self.on_binary: OnMessage | None = None
        self.on_writable: OnWritable = lambda writable: None

    def attach(self, on_text: OnMessage, on_binary: OnMessage, on_writable: OnWritable) -> None:
        """Deliver all messages to these callbacks, including those that arrived before the handshake was answered."""
        self.on_text, self.on_binary, self.on_writable = on_text, on_binary, on_writable
        self._protocol.hold(False)

    def send_binary(self, message: bytes) -> None:
        self._protocol.send_message(message, text=False)

    def send_text(self, message: bytes) -> None:
        self._protocol.send_message(message, text=True)

    def pause(self) -> None:
        """Stop reading until `resume`."""
        self._protocol.hold(True)

    def resume(self) -> None:
        self._protocol.hold(False)

    def unsent(self) -> int:
        """Bytes written that the client has not taken yet."""
        return self._protocol.transport.get_write_buffer_size()

    def close(self, code: int, reason: str) -> None:
        """Send no more; discard later messages of the client."""
        self._protocol.send_close(code, reason)

    def abort(self) -> None:
        self._protocol.transport.abort()

    def end(self) -> None:
        """No more messages will arrive."""
        if not self.closed.done():
            self.closed.set_result(None)


def stream_protocol(turns: Turns, held: HeldBytes) -> type["StreamProtocol"]:
    """The protocol class for `uvicorn.Config(ws=...)`."""
    return type("StreamProtocol", (StreamProtocol,), {"turns": turns, "held": held})


class StreamProtocol(WebSocketsSansIOProtocol):
    """Offers its connection as a `DirectLink`, and behaves like uvicorn's protocol until that is attached.

    Received data is split into frames here. Complete binary messages go to the stream, everything else to the library.
    The library's generator-based parser is several times as expensive.
    """

    turns: Turns
    held: HeldBytes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = ServerProtocol(max_size=self.config.ws_max_size, logger=self.logger)
        self.conn.debug = False  # otherwise it logs the headers
        self._direct = DirectLink(self)
        self._rest = b""  # received and not yet handled
        self._missing = 0  # outstanding bytes of a partially handled frame
        self._fragments = 0  # frames of an incomplete message
        self._held = True  # paused: until the stream is attached, and later by it
        self._reads, self._in_turn = True, False
        self._waits = self._lined_up = False  # needs another turn; has requested one
        self._cut_off = False
        self._pings = Allowance(*PINGS)
        self._partial = 0  # bytes of an incomplete message
        self._message = Holding(self.held, MESSAGES)
        self._unread = Holding(self.held, ANSWERS)
        self.on_lost: Callable[[], None] = lambda: None

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.response.status_code == 101:  # the application's task has not started yet
            self.scope["extensions"][EXTENSION] = self._direct  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self.handshake_initiated:
            data = self._rest + data if self._rest else data
            if len(data) > _SHORT_BYTES and self.turns.busy:  # others are waiting, too
                self._waits = True
                self._end_turn(data)
            elif not self._cut_off:
                self._take_turn(data)
            return
        super().data_received(data)
        if self.conn.handshake_exc is not None:  # uvicorn handles only valid requests
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    # ── turns ────────────────────────────────────────────────────────────────────────────────────

    def hold(self, held: bool) -> None:
        """Pause or resume the handling of messages."""
        self._held = held
        if not self._in_turn:
            self._waits |= bool(self._rest)
            self._end_turn(self._rest)

    def _take_turn(self, data: bytes) -> None:
        """Handle as many frames as fit in one turn; the rest waits until other connections had theirs."""
        self._in_turn = True
        taken, size, until, most = 0, len(data), 0.0, self.config.ws_max_size
        if self._missing:
            taken = min(self._missing, size)
            self._missing -= taken
            self._partial += taken
            super().data_received(data[:taken])
        while size - taken > 1 and not self._held:
            first, length, begin = data[taken], data[taken + 1] & ~_MASKED, taken + 2
            if length == _TWO_BYTES:
                length, begin = int.from_bytes(data[begin : begin + 2]), begin + 2
            elif length == _EIGHT_BYTES:
                length, begin = int.from_bytes(data[begin : begin + 8]), begin + 8
            if masked := data[taken + 1] & _MASKED:
                begin += 4
            if begin > size:
                break
            end = begin + length
            whole = first == _FIN_BINARY and masked and end <= size and length <= most and not self._fragments
            if whole and self._direct.on_binary is not None and not self.close_sent:
                self._direct.on_binary(apply_mask(data[begin:end], data[begin - 4 : begin]))
            else:
                self._parse(first, data[taken:end])
                self._missing = max(0, end - size)
                self._partial += min(end, size) - taken
            if end >= size or self._cut_off or self.transport.is_closing():
                taken = size
                break
            taken, now = end, perf_counter()
            if length > _TURN_BYTES or now > (until := until or now + _TURN_SECONDS):
                self._waits = True
                break
        self._in_turn = False
        if self._partial:
            self._count_partial()
        self._waits |= size > LONG_BYTES  # uvloop reads up to 8 MB of each connection at once
        if taken < size or self._waits or self._reads == self._held:
            self._end_turn(data[taken:])
        elif self._rest:
            self._rest = b""

    def _count_partial(self) -> None:
        """Account for an incomplete message, and close the connection if there is no room for it."""
        if not (self._missing or self._fragments) or self._cut_off or self.transport.is_closing():
            self._partial = 0
            self._message.resize(0)
        elif self._partial > SMALL and (error := self._message.grow(self._partial, self._direct.tenant)) is not None:
            self.send_close(TRY_AGAIN, error.message[:_MAX_REASON])

    def _parse(self, first: int, frame: bytes) -> None:
        """Pass a frame, or its start, to the library."""
        super().data_received(frame)
        opcode = first & _OPCODE
        if not opcode & _CONTROL:
            self._fragments = 0 if first & _FIN else self._fragments + 1
            if self._fragments > MAX_FRAGMENTS:
                self.send_close(TOO_MUCH, f"too many fragments: the limit is {MAX_FRAGMENTS} per message")
        elif opcode != Opcode.CLOSE and self._pings.take():
            self.send_close(TOO_MUCH, f"too many pings and pongs: the limit is {PINGS[0]:g} per second")

    def _end_turn(self, rest: bytes) -> None:
        """Keep the rest. Either resume reading, or request another turn to handle the rest first."""
        self._rest = b"" if self._cut_off or self.transport.is_closing() else rest
        if self._waits and not (self._held or self._lined_up):
            self._lined_up = True
            self.turns.call(self._go_on)
        self._reads = not (self._held or self._lined_up)
        if self.transport.is_reading() != self._reads and not self.transport.is_closing():
            (self.transport.resume_reading if self._reads else self.transport.pause_reading)()

    def _go_on(self) -> None:
        self._lined_up = self._waits = False
        self._take_turn(self._rest)

    # ── messages ─────────────────────────────────────────────────────────────────────────────────

    def send_receive_event_to_app(self) -> None:
        direct = self._direct
        sink = direct.on_text if self.curr_msg_data_type == "text" else direct.on_binary
        frames, self.frames = self.frames, []
        message = frames[0] if len(frames) == 1 else b"".join(frames)
        if self.curr_msg_data_type == "text" and not _is_utf_8(message):
            self.send_close(1007, "a text message must be UTF-8")
        if sink is not None and not self.close_sent:
            sink(message)

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
        """Start the closing handshake, and close after the client's answer: closing with unread data would make the
        kernel reset the connection and drop outgoing data."""
        if self.close_sent or self.disconnected or self.transport.is_closing():
            return
        self.conn.send_close(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self._cut_off = code in (TOO_MUCH, TRY_AGAIN)
        self.hold(False)
        linger = _LINGER_SECONDS if self._cut_off else self.close_timeout
        self.close_timer = self.loop.call_later(linger, self.transport.close)
        self._direct.end()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and self.close_sent:
            self.handshake_complete = True  # otherwise uvicorn would report a refusal as a missing response
        if self.close_sent:
            self.hold(False)  # for the client's answer to a close

    def handle_close(self, event: Frame) -> None:
        super().handle_close(event)
        self._direct.end()

    def handle_parser_exception(self) -> None:
        super().handle_parser_exception()
        self._direct.end()

    def shutdown(self) -> None:
        """Does nothing: a stream closes itself, see `Connection.drain`, and the application refuses pending ones."""

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._rest = b""
        self._message.resize(0)
        self._unread.resize(0)
        self.on_lost()
        self._direct.end()

    def keepalive_timeout(self) -> None:
        """Called when no pong arrived in time. The client is dead, unless its pong is behind data not read yet."""
        if self.transport.is_reading():
            super().keepalive_timeout()
        else:
            self.pong_timer = self.pending_ping_payload = None
            self.schedule_ping()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread.resize(self._direct.unsent(), self._direct.tenant)
        self._direct.on_writable(False)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread.resize(0)
        self._direct.on_writable(True)


def _is_utf_8(message: bytes) -> bool:
    try:
        message.decode()
    except UnicodeDecodeError:
        return False
    return True
