"""uvicorn's HTTP protocol, which answers the inference routes itself and hands everything else to the application.

A request of these routes costs no task and no ASGI messages: the work starts when the last byte has been parsed, and
its end writes the reply in one piece. A lost connection cancels its work immediately.
"""

import asyncio
import functools
from time import perf_counter
from typing import Any
from urllib.parse import unquote

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from unroll.service.api import inference_routes
from unroll.service.api.app_state import AppState
from unroll.service.api.inference_routes import Route
from unroll.service.api.request import Answer, Cancel, Headers, Request, checked_headers, nothing_to_cancel
from unroll.service.core import failpoints
from unroll.service.core.errors import BodyTooLarge, UnrollError


def http_protocol(app: AppState) -> type[HttpToolsProtocol]:
    """The protocol class for `uvicorn.Config(http=...)`."""
    return type("HttpProtocol", (HttpProtocol,), {"unroll": app})


class Exchange(Request):
    """The inference request of a connection, in place of uvicorn's own request record.

    A connection reuses one instance for all of its requests.
    """

    __slots__ = (
        "cancel",
        "disconnected",
        "keep_alive",
        "more_body",
        "response_complete",
        "room",
        "route",
        "started",
    )

    def __init__(self) -> None:
        super().__init__({}, b"")
        self.cancel: Cancel = nothing_to_cancel
        self.response_complete = True
        self.disconnected = False
        self.more_body = False

    def begin(self, route: Route, room: int, keep_alive: bool) -> None:
        """room: bytes the body may still have."""
        self.route = route
        self.room = room
        self.keep_alive = keep_alive
        self.body = b""
        self.response_complete = False
        self.started = perf_counter()

    @property
    def message_event(self) -> "Exchange":
        """uvicorn sets it when the connection is lost."""
        return self

    def set(self) -> None:
        """See `message_event`: the protocol cancels by itself."""


class HttpProtocol(HttpToolsProtocol):
    unroll: AppState
    cycle: Any  # uvicorn's record of the request, or our `Exchange`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._exchange = Exchange()
        self._parts: list[bytes] = []  # of the body, after the first
        self._respond = self._answer
        self._route: Route | None = None
        self._path: inference_routes.Path = []
        self._route_url = b""
        self._idle_since: float | None = None
        self._idle_timer: asyncio.TimerHandle | None = None

    # ── the parser's callbacks ───────────────────────────────────────────────────────────────────

    def on_message_begin(self) -> None:
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._idle_since = None

    def on_headers_complete(self) -> None:
        route = self._find_route()
        if route is None:
            self._begin_for_uvicorn()
            return
        limit = self.unroll.limits.max_body_bytes
        exchange = self._exchange
        keep_alive = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        exchange.begin(route, limit, keep_alive and not self.unroll.draining)
        self.cycle = exchange
        try:
            exchange.headers = checked_headers(self.headers, limit)
        except UnrollError as error:
            self._answer(route.failure(error))

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        if self.cycle is not exchange:
            super().on_body(body)
        elif not exchange.response_complete:
            exchange.room -= len(body)
            if exchange.room < 0:
                error = BodyTooLarge(f"a body may have {self.unroll.limits.max_body_bytes} bytes")
                self._answer(exchange.route.failure(error))
            elif exchange.body:
                self._parts.append(body)
            else:
                exchange.body = body

    def on_message_complete(self) -> None:
        exchange = self._exchange
        if self.cycle is not exchange:
            super().on_message_complete()
        elif not exchange.response_complete:
            if self._parts:
                exchange.body = b"".join([exchange.body, *self._parts])
                self._parts.clear()
            failpoints.reach("recv")
            cancel = exchange.route.handle(self.unroll, self._path, exchange, self._respond)
            self.headers.clear()
            exchange.headers, exchange.body = _NO_HEADERS, b""
            if not exchange.response_complete:
                exchange.cancel = cancel

    def _find_route(self) -> Route | None:
        """The requested inference route; None leaves the request to uvicorn and the application."""
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy or self.expect_100_continue or self.parser.get_method() != b"POST" or self.parser.should_upgrade():
            return None
        if self.url != self._route_url:  # most clients repeat their last route
            path = self.url.partition(b"?")[0].decode("ascii", "replace")
            self._path = (unquote(path) if "%" in path else path).split("/")
            self._route = inference_routes.find(self._path)
            self._route_url = self.url
        return self._route

    def _begin_for_uvicorn(self) -> None:
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        super().on_headers_complete()
        if self.unroll.draining and self.cycle is not None:
            self.cycle.keep_alive = False

    # ── answering ────────────────────────────────────────────────────────────────────────────────

    def _answer(self, answer: Answer) -> None:
        exchange = self._exchange
        exchange.response_complete = True
        exchange.cancel = nothing_to_cancel
        self._parts.clear()
        self.unroll.count(exchange.route.name, answer.status, perf_counter() - exchange.started)
        failpoints.reach("before_reply")
        if self.transport.is_closing():
            return
        self.transport.write(
            b"%b%b%bcontent-length: %d\r\n\r\n%b"
            % (
                _head(answer.status, answer.media_type),
                answer.fields,
                b"" if exchange.keep_alive else b"connection: close\r\n",
                len(answer.body),
                answer.body,
            )
        )
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        """As uvicorn's, but with one timer for the connection instead of one for each request."""
        if self.pipeline or self.cycle is not self._exchange:
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def _close_if_idle(self) -> None:
        self._idle_timer = None
        if self.transport.is_closing():
            return
        left = float(self.timeout_keep_alive)
        if self._idle_since is not None:
            left -= self.loop.time() - self._idle_since
            if left <= 0:
                self.transport.close()
                return
        self._idle_timer = self.loop.call_later(left, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._exchange.cancel()


_NO_HEADERS: Headers = {}


@functools.cache
def _head(status: int, media_type: bytes) -> bytes:
    return b"%bcontent-type: %b\r\n" % (STATUS_LINE[status], media_type)
