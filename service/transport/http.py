"""uvicorn's HTTP protocol, which answers the inference routes itself and hands everything else to the application.

A request of these routes costs no task and no ASGI messages: when its last byte has been parsed the work begins, and
when the work is done the answer is written, in one piece. A connection that is lost cancels its work at once.
"""

import asyncio
from functools import partial
from typing import Any
from urllib.parse import unquote

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.api import routes
from service.api.http import Answer, Cancel, Headers, Request, checked_headers, nothing_to_cancel
from service.api.routes import Route
from service.api.server import Server
from service.core.errors import BodyTooLarge, UnrollError


def http_protocol(server: Server) -> type[HttpToolsProtocol]:
    """For `uvicorn.Config(http=...)`."""
    return type("HttpProtocol", (HttpProtocol,), {"unroll": server})


class Exchange:
    """One request of an inference route and its answer; stands where uvicorn has its RequestResponseCycle."""

    __slots__ = (
        "cancel",
        "disconnected",
        "headers",
        "keep_alive",
        "more_body",
        "parts",
        "response_complete",
        "room",
        "route",
    )

    def __init__(self, route: Route, headers: Headers, room: int, keep_alive: bool) -> None:
        self.route = route
        self.headers = headers
        self.parts: list[bytes] = []
        self.room = room  # bytes the body may still have
        self.keep_alive = keep_alive
        self.cancel: Cancel = nothing_to_cancel
        self.response_complete = False
        self.disconnected = False
        self.more_body = True

    @property
    def message_event(self) -> "Exchange":
        """uvicorn sets it when the connection is lost."""
        return self

    def set(self) -> None:
        """See `message_event`: the protocol cancels by itself."""


class HttpProtocol(HttpToolsProtocol):
    unroll: Server

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._exchange: Exchange | None = None  # being answered
        self._route: Route | None = None
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
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        limit = self.unroll.limits.max_body_bytes
        self.cycle = self._exchange = exchange = Exchange(route, {}, limit, keep_alive)  # type: ignore[assignment]
        try:
            exchange.headers = checked_headers(self.headers, limit)
        except UnrollError as error:
            self._answer(exchange, route.failure(error))

    def on_body(self, body: bytes) -> None:
        exchange = self.cycle
        if not isinstance(exchange, Exchange):
            super().on_body(body)
        elif not exchange.response_complete:
            exchange.parts.append(body)
            exchange.room -= len(body)
            if exchange.room < 0:
                error = BodyTooLarge(f"a body may have {self.unroll.limits.max_body_bytes} bytes")
                self._answer(exchange, exchange.route.failure(error))

    def on_message_complete(self) -> None:
        exchange = self.cycle
        if not isinstance(exchange, Exchange):
            super().on_message_complete()
        elif not exchange.response_complete:
            exchange.more_body = False
            parts = exchange.parts
            request = Request(exchange.headers, parts[0] if len(parts) == 1 else b"".join(parts))
            exchange.cancel = exchange.route.handle(self.unroll, request, partial(self._answer, exchange))

    def _find_route(self) -> Route | None:
        """The inference route asked for; None leaves the request to uvicorn and the application."""
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy or self.expect_100_continue or self.parser.get_method() != b"POST" or self.parser.should_upgrade():
            return None
        if self.url != self._route_url:  # a client's next request mostly goes where its last one went
            path = self.url.partition(b"?")[0].decode("ascii", "replace")
            self._route = routes.find(unquote(path) if "%" in path else path)
            self._route_url = self.url
        return self._route

    def _begin_for_uvicorn(self) -> None:
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        super().on_headers_complete()

    # ── answering ────────────────────────────────────────────────────────────────────────────────

    def _answer(self, exchange: Exchange, answer: Answer) -> None:
        exchange.response_complete = True
        exchange.cancel = nothing_to_cancel
        self._exchange = None
        if self.transport.is_closing():
            return
        head = [STATUS_LINE[answer.status], b"content-type: ", answer.media_type]
        for name, value in (*self.server_state.default_headers, *answer.headers):
            head += (b"\r\n", name, b": ", value)
        if not exchange.keep_alive:
            head.append(b"\r\nconnection: close")
        head.append(b"\r\ncontent-length: %d\r\n\r\n" % len(answer.body))
        head.append(answer.body)
        self.transport.write(b"".join(head))
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        """As uvicorn's, but with one timer for the connection instead of one for each request."""
        if self.pipeline or not isinstance(self.cycle, Exchange):
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
        if self._exchange is not None:
            self._exchange.cancel()
