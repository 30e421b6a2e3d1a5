"""Limits per connection: time, bytes, and the total number of connections."""

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from unroll.service.access.held_bytes import ANSWERS, REQUESTS, SMALL, Holding
from unroll.service.api.app_state import AppState
from unroll.service.api.request import TENANT, Request
from unroll.service.core.errors import TooManyConnections
from unroll.service.core.turns import LONG_BYTES
from unroll.service.transport.connections import ConnectionLimits, Connections, UnreadAnswer, unsent
from unroll.service.transport.head import MAX_FIELD_BYTES, MAX_FIELDS, MAX_URL_BYTES, Refused, too_many_header_bytes

#: Paths that are answered even when there are too many connections.
PROBE_URLS = frozenset((b"/livez", b"/readyz", b"/metrics", b"/v2/health/live", b"/v2/health/ready"))
#: Maximum overhead of chunked framing (lengths, extensions, line ends): a constant, plus a factor of the body's size.
MAX_FRAMING_BYTES = 65_536
MAX_FRAMING_FACTOR = 8
#: Interval of the probes of a client that has closed its half of the connection.
_PROBE_SECONDS = 0.1
#: How long a refused client may take to stop sending.
_LINGER_SECONDS = 2.0
#: Bytes of a chunked body, or of a segment with many requests, that are parsed per turn of the event loop.
_TURN_BYTES = 4096
#: Segments up to this size are parsed at once: a small request with any head that may be repeated.
_WHOLE_BYTES = SMALL + 4096


class _Flow(FlowControl):
    """Reads while neither uvicorn has paused it nor received bytes wait for their turn."""

    def __init__(self, transport: asyncio.Transport, line_up: Callable[[], None]) -> None:
        """line_up: called when uvicorn resumes while bytes wait."""
        super().__init__(transport)
        self._line_up = line_up
        self.waits = False

    def pause_reading(self) -> None:
        self.read_paused = True
        self._apply()

    def resume_reading(self) -> None:
        self.read_paused = False
        if self.waits:
            self._line_up()
        else:
            self._apply()

    def wait(self, waits: bool) -> None:
        self.waits = waits
        self._apply()

    def _apply(self) -> None:
        reads = not (self.read_paused or self.waits)
        if self._transport.is_reading() != reads and not self._transport.is_closing():
            (self._transport.resume_reading if reads else self._transport.pause_reading)()


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits; `HttpProtocol` adds the fast path."""

    unroll: AppState
    limits: ConnectionLimits
    all_connections: Connections
    cycle: Any
    flow: _Flow

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.url = b""
        self._in_head = self._in_body = False
        self._segment = 0  # size of the last segment
        self._held_bytes = 0  # size of an open head or trailer, as far as known
        self._received = 0  # bytes of an open request, after its first segment
        self._is_chunked = False
        self._left = 0  # bytes of the body that are still to come, if its length is known
        self._rest = b""  # received and not yet parsed
        self._lined_up = False  # has requested a turn
        self._takes_offer = False  # becomes a stream
        self._runs: Any = None  # the request that is being answered, or was last; others may be pipelined
        self._last_words = b""  # the last answer, after which the connection is closed
        self._sends_no_more = False
        self._since: float | None = None  # when `check` first saw the current wait
        self._unread = UnreadAnswer()
        self.body = Holding(self.unroll.held, REQUESTS)
        self.unread = Holding(self.unroll.held, ANSWERS)

    def _feed(self, data: bytes) -> None:
        raise NotImplementedError

    def _refuse(self, refused: Refused) -> None:
        raise NotImplementedError

    def _new_parser(self) -> None:
        raise NotImplementedError

    def _tenant(self) -> str:
        """The tenant of the request that is being answered, or was last; empty without keys."""
        cycle = self._runs
        tenant: str = cycle.tenant if isinstance(cycle, Request) else cycle.scope.get(TENANT, "") if cycle else ""
        return tenant

    def _body_bytes(self) -> int:
        raise NotImplementedError

    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # ── the number of connections ────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.flow = _Flow(transport, self._line_up)
        limit = self.all_connections.enter(self, self.client[0] if self.client else "")
        if limit is not None:
            self.on_headers_complete = partial(self._answer_probes_only, limit)  # type: ignore[method-assign]
            self._new_parser()

    def _answer_probes_only(self, limit: str) -> None:
        """Replaces `on_headers_complete` on a connection beyond the limit."""
        is_probe = self.url in PROBE_URLS and self.parser.get_method() in (b"GET", b"HEAD")
        if not is_probe or self.parser.should_upgrade():
            self.all_connections.count_refused(limit)
            raise Refused(503, "", TooManyConnections("the server has reached its limit of connections; retry"))
        type(self).on_headers_complete(self)
        self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._runs = cycle
        super()._start_asgi_task(cycle, app)

    def is_idle(self) -> bool:
        return not (self._in_head or self._in_body or self._busy() or self._takes_offer or self._last_words)

    def close_for_another(self) -> None:
        self.transport.close()

    def _upgrade_later(self, rest: bytes) -> None:
        """Become a stream in another turn, because that takes as long as many steps. rest: its first frames."""
        self._rest = rest + self._rest
        self.flow.pause_reading()
        self.unroll.turns.call(self.handle_websocket_upgrade)

    def handle_websocket_upgrade(self) -> None:
        if self.transport.is_closing():
            return
        frames, self._rest = self._rest, b""
        self.flow.wait(False)
        self.flow.resume_reading()
        super().handle_websocket_upgrade()
        stream: Any = self.transport.get_protocol()
        stream.on_lost = self.all_connections.becomes_stream(self)
        stream.data_received(frames)

    def connection_lost(self, exc: Exception | None) -> None:
        self.all_connections.leave(self)
        self.body.resize(0)
        self.unread.resize(0)
        self._rest = b""
        self.flow.read_paused = False  # there is nothing to resume
        super().connection_lost(exc)
        if self._runs is not None:  # uvicorn notifies only the last request of the connection
            self._runs.disconnected = True
            self._runs.message_event.set()

    # ── the end of the connection ────────────────────────────────────────────────────────────────

    def eof_received(self) -> bool:  # type: ignore[override]  # as in asyncio
        """Answer pending requests before closing, because a client that has stopped sending may still read."""
        if self.scheme == "https":  # TLS ends both directions at once
            return False
        self._sends_no_more = True
        if self._last_words:
            return self._busy()
        if self._in_head or self._in_body:
            self._refuse(Refused(400, "the request ended before it was complete"))
        elif self._busy():
            self.cycle.keep_alive = False
            if self._version() == "1.1":
                self.loop.call_later(_PROBE_SECONDS, self._probe)
        else:
            return False
        return True

    def _end(self) -> None:
        """Send the last answer, and keep reading for a while: with unread data, the kernel would drop the answer."""
        if self.transport.is_closing():
            return
        self.transport.write(self._last_words)
        if self._sends_no_more:
            self.transport.close()
        else:
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _probe(self, sent: bool = False) -> None:
        """Detect a client that has disconnected, and cancel its work.

        A closed connection looks like a half-closed one until something is sent. An interim response is safe, because
        every HTTP/1.1 client skips it.
        """
        if self.transport.is_closing() or not self._busy() or getattr(self.cycle, "response_started", False):
            return
        if not sent:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        self.loop.call_later(_PROBE_SECONDS, self._probe, True)

    def _version(self) -> str:
        version: str = self.parser.get_http_version()
        return version

    # ── bytes ────────────────────────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        is_chunked = self._is_chunked and self._in_body  # tiny chunks are expensive to parse
        if self._rest or self._takes_offer:
            self._rest += data
        elif len(data) <= (_TURN_BYTES if is_chunked else _WHOLE_BYTES):
            self._feed(data)
        else:
            self._rest = data
            self._feed_slice()
            if self._left:
                self._feed_slice()
            if self._rest or len(data) > LONG_BYTES:  # uvloop reads up to 8 MB of each connection at once
                self.flow.wait(True)
                self._line_up()

    def _feed_slice(self) -> None:
        size = max(_TURN_BYTES, self._left)
        data, self._rest = self._rest[:size], self._rest[size:]
        self._feed(data)

    def _line_up(self) -> None:
        if not self._lined_up:
            self._lined_up = True
            self.unroll.turns.call(self._take_turn)

    def _take_turn(self) -> None:
        """Parse a slice of the rest, unless earlier requests or answers come first, or read again."""
        self._lined_up = False
        if self._takes_offer:
            return
        if self._last_words or self.transport.is_closing():
            self._rest = b""
        if not self._rest:
            self.flow.wait(False)
        elif not (self.pipeline or self.flow.read_paused or self.flow.write_paused):
            self._feed_slice()
            self._line_up()

    def on_url(self, url: bytes) -> None:
        self.url += url
        if len(self.url) > MAX_URL_BYTES:
            raise Refused(414, f"the URL exceeds the limit of {MAX_URL_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer, which is ignored
        if len(value) > MAX_FIELD_BYTES:
            raise Refused(431, f"a header field has {len(value)} bytes; the limit is {MAX_FIELD_BYTES}")
        if len(self.headers) == MAX_FIELDS:
            raise Refused(431, f"the request exceeds the limit of {MAX_FIELDS} header fields")
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def _limit_held(self) -> None:
        """Limit an open head or trailer, which the parser buffers; its first segment may have other data."""
        self._held_bytes += self._segment if self._held_bytes else 1
        self._received += self._segment if self._received else 1
        if self._last_words:
            return
        if self._held_bytes > self.limits.header_bytes:
            self._refuse(too_many_header_bytes(self.limits.header_bytes))
        elif self._in_body and self._busy():
            taken = self._body_bytes()
            if self._received - taken > self.limits.header_bytes + MAX_FRAMING_BYTES + MAX_FRAMING_FACTOR * taken:
                self._refuse(Refused(400, "the chunked body has far more framing than content"))

    def pause_writing(self) -> None:
        """Stop reading from a client that does not read its answers."""
        super().pause_writing()
        self.flow.pause_reading()
        self.unread.resize(self.transport.get_write_buffer_size(), self._tenant())

    def resume_writing(self) -> None:
        super().resume_writing()
        self.unread.resize(0)
        if not self.pipeline:
            self.flow.resume_reading()

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    def check(self, now: float) -> None:
        """Close the connection if its client sends or reads too slowly."""
        if not self._unread.check(now, unsent(self.transport), self.limits):
            self.transport.abort()
        if self._last_words or self.transport.is_closing():
            return
        if self._since is None or not self.transport.is_reading():
            self._since = now
            return
        seconds, limits = now - self._since, self.limits
        if self._in_head:
            if seconds > limits.head_timeout:
                self._refuse(Refused(408, f"the head of the request did not arrive within {limits.head_timeout:g} s"))
        elif self._in_body:
            if seconds > limits.head_timeout + self._received / limits.min_rate:
                self._refuse(Refused(408, f"the body arrived at less than {limits.min_rate} bytes per second"))
        elif self.is_idle() and seconds > (limits.head_timeout if self.cycle is None else self.timeout_keep_alive):
            self.transport.close()
