"""uvicorn's HTTP protocol, extended to answer the inference routes directly; other requests go to the application.

A request to these routes needs no task and no ASGI messages. Its work starts when the last byte is parsed, and its
reply is one write. A lost connection cancels the work immediately.
"""

import functools
from time import perf_counter
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from unroll.service.access.held_bytes import SMALL
from unroll.service.access.keys import INFER
from unroll.service.api import inference_routes
from unroll.service.api.answer_log import log_answer
from unroll.service.api.inference_routes import Route
from unroll.service.api.path_segments import split
from unroll.service.api.request import (
    CONTENT_ENCODING,
    Answer,
    Headers,
    Request,
    check_headers,
    nothing_to_cancel,
)
from unroll.service.core import failpoints
from unroll.service.core.errors import BodyTooLarge, UnrollError
from unroll.service.core.turns import LONG_BYTES
from unroll.service.protocol.open_inference import RepeatedText
from unroll.service.transport.head import (
    Refused,
    check_head,
    check_size,
    check_url,
    offers_stream,
    refusal_of,
    without_offer,
)
from unroll.service.transport.known_head import KnownHead
from unroll.service.transport.limited import LimitedProtocol
from unroll.service.transport.long_body import LongBody


class Exchange(Request):
    """A connection's inference request, in place of uvicorn's `RequestResponseCycle`. Reused for all its requests."""

    def __init__(self) -> None:
        super().__init__({}, b"")
        self.response_complete = True
        self.disconnected = False
        self.more_body = False

    def begin(self, route: Route, room: int, keep_alive: bool) -> None:
        """Reset for a new request. room: bytes that the body may still grow."""
        self.route = route
        self.room = room
        self.keep_alive = keep_alive
        self.body = b""
        self.session = self.position = None
        self.response_complete = False
        self.started = perf_counter()

    @property
    def message_event(self) -> "Exchange":
        """uvicorn calls its `set` when the connection is lost."""
        return self

    def set(self) -> None:
        """Does nothing, because the protocol cancels the work itself."""


class HttpProtocol(LimitedProtocol):
    cycle: Any  # uvicorn's record of the request, or our `Exchange`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._exchange = Exchange()
        self._parts: list[bytearray] = []  # parts of the body after the first
        self._respond = self._answer
        self._route: Route | None = None
        self._path: inference_routes.Path = []
        self._asked = b"", b""  # method and URL of the last request
        self._known: KnownHead | None = None  # the last request's head, if that was for `_route`
        self._misses = 0  # consecutive requests with a new head
        self._data = b""  # the segment being parsed, if no request was open before it
        self._other_body_bytes = 0  # body size of a request that uvicorn answers
        self._long_body = LongBody(
            self.unroll.turns, self.unroll.limits, self._is_lost, self._hold, self._handle, self._fail
        )

    # ── bytes ────────────────────────────────────────────────────────────────────────────────────

    def _feed(self, data: bytes) -> None:
        if self._last_words:
            return
        if (known := self._known) is not None and self.is_idle():
            if (body := known.body_of(data)) is not None:
                self._begin_known(known, body)
                return
            self._misses += 1
        self._segment = len(data)
        self._data = b"" if self._in_head or self._in_body else data
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as end:
            rest = data[end.args[0] :]
            if self._takes_offer:
                self._upgrade_later(rest)
            else:
                head = without_offer(self.parser.get_method(), self._version(), self.url, self.headers)
                self._new_parser()
                self._feed(head + rest)
        except httptools.HttpParserError as error:
            self._refuse(refusal_of(error))
        self._data = b""
        if self._in_head or self._in_body:
            self._limit_held()
            if self._in_body and self._busy() and not self._last_words and self._body_bytes() > SMALL:
                self._fits(self._body_bytes())

    def _new_parser(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _body_bytes(self) -> int:
        exchange = self._exchange
        return self.unroll.limits.max_body_bytes - exchange.room if self.cycle is exchange else self._other_body_bytes

    # ── the parser's callbacks ───────────────────────────────────────────────────────────────────

    def on_message_begin(self) -> None:
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._in_head = True
        self._known = None
        self._held_bytes = self._received = self._left = 0
        self._since = None

    def on_headers_complete(self) -> None:
        self._in_head = False
        version = self._version()
        if self._held_bytes or self._segment > self.limits.header_bytes:  # it spans several segments, or is long
            check_size(self.headers, self.limits.header_bytes)
        headers = check_head(version, self.headers)
        if b"%" in self.url:
            check_url(self.url)
        if self.parser.should_upgrade():
            self._consider_offer(version, headers)
            return
        self._is_chunked = b"transfer-encoding" in headers
        length = headers.get(b"content-length", b"0")
        self._left = 0 if self._is_chunked or len(length) > _MOST_DIGITS else int(length)
        route = self._find_route()
        if route is None:
            self._begin_for_uvicorn()
            self._in_body = True
            return
        self._in_body = True
        limit = self.unroll.limits.max_body_bytes
        exchange = self._exchange
        keep_alive = self.parser.should_keep_alive() and version != "1.0"
        exchange.begin(route, limit, keep_alive and not self.unroll.draining)
        exchange.repeat = exchange.text = None
        self.cycle = self._runs = exchange
        try:
            exchange.tenant = self.unroll.gate.admit(headers, INFER, changes=True)
            check_headers(self.headers, headers, limit)
            exchange.headers = headers
        except UnrollError as error:
            self._fail(error)

    def on_body(self, body: bytes) -> None:
        self._held_bytes = 0
        self._left = max(0, self._left - len(body))
        exchange = self._exchange
        if self.cycle is not exchange:
            self._other_body_bytes += len(body)
            super().on_body(body)
        elif not exchange.response_complete:
            exchange.room -= len(body)
            if exchange.room < 0:
                self._fail(BodyTooLarge(f"the body exceeds the limit of {self.unroll.limits.max_body_bytes} bytes"))
            elif exchange.body:
                if not self._parts or len(self._parts[-1]) > SMALL:
                    self._parts.append(bytearray())
                self._parts[-1] += body
            else:
                exchange.body = body

    def on_message_complete(self) -> None:
        self._in_body = False
        if self.parser.should_upgrade():
            return
        exchange = self._exchange
        if self.cycle is not exchange:
            super().on_message_complete()
        elif not exchange.response_complete:
            self.headers.clear()
            if self._parts:
                exchange.body = b"".join([exchange.body, *self._parts])
                self._free_parts()
            size = len(exchange.body)
            if size > SMALL and not self._fits(size):
                return
            if exchange.keep_alive and self._misses < _MOST_MISSES:
                self._known = KnownHead.of(self._data, exchange.headers, exchange.body)
                exchange.text = None if self._known is None else RepeatedText()
            if CONTENT_ENCODING in exchange.headers:
                self._long_body.decode(exchange, exchange.route.takes_document)
            elif size > LONG_BYTES:
                self._long_body.read(exchange, exchange.route.takes_document)
            else:
                self._handle()

    def _begin_known(self, known: KnownHead, body: bytes) -> None:
        """Handle a complete request with a known head. Only its key is checked again, if keys have changed since."""
        exchange, route = self._exchange, self._route
        assert route is not None
        exchange.begin(route, 0, not self.unroll.draining)
        self._misses = 0
        self.cycle = self._runs = exchange
        try:
            exchange.tenant = known.admit(self.unroll.gate)
        except UnrollError as error:
            self._fail(error)
            return
        exchange.headers, exchange.body = known.headers, body
        self._handle()

    def _handle(self) -> None:
        exchange = self._exchange
        failpoints.reach("recv")
        cancel = None if exchange.repeat is None else exchange.repeat(exchange, self._respond)
        if cancel is None:
            exchange.route.handle(self.unroll, self._path, exchange, self._respond)
        elif not exchange.response_complete:
            exchange.cancel = cancel
        if exchange.again is None:
            exchange.headers, exchange.body = _NO_HEADERS, b""

    def _fits(self, size: int) -> bool:
        """Reserve `size` held bytes. If there are too many, answer the request with the error and return False."""
        error = self._hold(size)
        if error is None:
            return True
        if self.cycle is self._exchange:
            self._fail(error)
        else:
            self._refuse(Refused(error.status, "", error))
        return False

    def _hold(self, size: int) -> UnrollError | None:
        return self.body.grow(size, self._tenant())

    def _find_route(self) -> Route | None:
        """The requested inference route; None leaves the request to uvicorn and the application."""
        asked = self.parser.get_method(), self.url
        if self._busy() or self.expect_100_continue or asked[0] not in (b"POST", b"DELETE"):
            return None
        if asked != self._asked:  # most clients repeat their last route
            path = self.url.partition(b"?")[0].decode("ascii", "replace")
            self._path = split(path)
            self._route = inference_routes.find(asked[0].decode(), self._path)
            self._asked = asked
        return self._route

    def _consider_offer(self, version: str, headers: Headers) -> None:
        """Handle an upgrade request, where the parser stops after the head."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise Refused(501, "this server is not a proxy: CONNECT is not implemented")
        self._takes_offer = not self._busy() and offers_stream(method, version, headers)
        if self._takes_offer:
            self._begin_for_uvicorn()

    def _should_upgrade(self) -> bool:
        return self._takes_offer

    def _begin_for_uvicorn(self) -> None:
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        self._other_body_bytes = 0
        super().on_headers_complete()
        if self.unroll.draining and self.cycle is not None:
            self.cycle.keep_alive = False

    # ── answering ────────────────────────────────────────────────────────────────────────────────

    def _fail(self, error: UnrollError) -> None:
        self._answer(self._exchange.route.failure(error))

    def _encode_on(self, answer: Answer) -> None:
        if self.transport.is_closing():
            answer.pieces = None
        else:
            answer.encode_slice()
        self._answer(answer)

    def _answer(self, answer: Answer) -> None:
        if answer.pieces is not None:
            self.unroll.turns.call(functools.partial(self._encode_on, answer))
            return
        exchange = self._exchange
        exchange.response_complete = True
        exchange.cancel, exchange.again = nothing_to_cancel, None
        exchange.headers, exchange.body = _NO_HEADERS, b""
        self._free_parts()
        self.unroll.count(exchange.route.name, answer.status, perf_counter() - exchange.started)
        if answer.status >= self.unroll.request_log.least_status:
            inference_routes.log(self.unroll, exchange.route, self._path, exchange, answer)
        failpoints.reach("before_reply")
        if self.transport.is_closing():
            return
        self.transport.write(_encoded(answer, exchange.keep_alive))
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _refuse(self, refused: Refused) -> None:
        """Answer an invalid request after the earlier ones, and close the connection."""
        answer = refused.answer(is_v2=self.url.startswith(b"/v2"))
        log_answer(self.unroll.request_log, "invalid HTTP", refused.status, refused.error)
        self._last_words = _encoded(answer, keep_alive=False)
        cycle = self.cycle
        if not self._in_body:
            if not self._busy():
                self._end()
        elif self.pipeline or not self._busy():  # earlier requests are waiting, or it is already answered
            self.transport.close()
        elif cycle is self._exchange:
            cycle.response_complete = True
            self.unroll.count(cycle.route.name, refused.status, perf_counter() - cycle.started)
            self._end()
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            self._end()

    def on_response_complete(self) -> None:
        """Like uvicorn's, but without a keep-alive timer: see `check`."""
        if self.body.size:
            self.body.resize(0)
        if self._last_words and not self.pipeline:
            self._end()
            return
        self.server_state.total_requests += 1
        self._since = None
        if self.transport.is_closing():
            return
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        if (self.flow.read_paused or self.flow.waits) and not (self.pipeline or self.flow.write_paused):
            self.flow.resume_reading()

    def _free_parts(self) -> None:
        if self._parts:
            self.unroll.turns.call(functools.partial(self.unroll.turns.free, self._parts))
            self._parts = []

    def _is_lost(self) -> bool:
        return self.transport.is_closing()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._exchange.cancel()
        self._exchange.body = b""
        self._free_parts()


class CrossOriginProtocol(HttpProtocol):
    """Leaves requests with an Origin to the application, which adds the CORS headers."""

    def _find_route(self) -> Route | None:
        return None if any(name == b"origin" for name, _ in self.headers) else super()._find_route()


class OperatorProtocol(HttpProtocol):
    def _find_route(self) -> Route | None:
        return None


_NO_HEADERS: Headers = {}
#: Longer lengths of bodies are refused, or start with zeros.
_MOST_DIGITS = 18
#: After this many misses, a connection's heads are no longer kept, because its requests do not repeat.
_MOST_MISSES = 8


def _encoded(answer: Answer, keep_alive: bool) -> bytes:
    return b"%b%b%bcontent-length: %d\r\n\r\n%b" % (
        _head(answer.status, answer.media_type),
        answer.fields,
        b"" if keep_alive else b"connection: close\r\n",
        len(answer.body),
        answer.body,
    )


@functools.cache
def _head(status: int, media_type: bytes) -> bytes:
    return b"%bcontent-type: %b\r\n" % (STATUS_LINE[status], media_type)
