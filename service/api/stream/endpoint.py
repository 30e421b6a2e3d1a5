"""The WebSocket route of streams: admits connections, and disconnects clients that do not read.

Web pages cannot send headers with a WebSocket, so they connect with a ticket.
"""

import asyncio
from collections.abc import Callable

import structlog
from fastapi import APIRouter, Request, WebSocket
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from unroll.service.api.admission import admit_stream
from unroll.service.api.answer_log import log_answer
from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import problem, problem_of, problem_responses, reason
from unroll.service.api.parameters import split_reference
from unroll.service.api.request import Answer
from unroll.service.api.stream.connection import Connection
from unroll.service.api.stream.link import AsgiLink, Link
from unroll.service.core.errors import UnrollError

_log = structlog.get_logger(__name__)

#: The WebSocket subprotocol, which clients may offer.
PROTOCOL = "unroll.v1"
#: Seconds after which a client that does not read is disconnected.
STALLED_SECONDS = 30.0


class Ticket(BaseModel):
    """seconds: how long it is valid."""

    ticket: str
    seconds: float


def router(server: AppState, *, stalled_seconds: float = STALLED_SECONDS) -> APIRouter:
    api = APIRouter()

    @api.websocket("/v1/models/{model}/stream")
    async def stream(websocket: WebSocket, model: str) -> None:
        if not server.gate.accepts_page(dict(websocket.scope["headers"])):
            log_answer(server.request_log, "v1/stream", 403, None, model=split_reference(model)[0])
            await _refuse_page(websocket)
            return
        extensions = websocket.scope.get("extensions") or {}
        link: Link = extensions.get("unroll.stream") or AsgiLink(websocket)
        try:
            key = admit_stream(server, websocket)
            link.tenant = "" if key is None else key.tenant
            connection = Connection(server, link.tenant, model, link, asyncio.get_running_loop().call_soon)
        except UnrollError as error:
            log_answer(server.request_log, "v1/stream", error.status, error, model=split_reference(model)[0])
            await _deny(websocket, problem(error))
            return
        slow_reader = SlowReaderTimer(link, connection.on_writable, stalled_seconds)
        try:
            await websocket.accept(PROTOCOL if PROTOCOL in websocket.scope["subprotocols"] else None)
            link.attach(connection.on_text, connection.on_binary, slow_reader.on_writable)
            with server.gate.watching(key, connection.drain):
                await link.closed
        finally:
            slow_reader.stop()
            connection.close()

    @api.get("/v1/models/{model}/stream", include_in_schema=False)
    async def without_upgrade(model: str) -> None:
        headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        raise HTTPException(426, "this is a stream: connect by WebSocket, version 13", headers)

    @api.post(
        "/v1/tickets",
        tags=["native v1"],
        summary="A ticket that opens streams in place of the API key, for a short time",
        description="Connect with the protocols `unroll.v1` and `unroll.ticket.` followed by the ticket.",
        responses=problem_responses({404: "not_found: this server has no keys, so streams need no ticket"}),
    )
    async def ticket(http: Request) -> Ticket:
        if not server.gate.has_keys:
            raise HTTPException(404, "this server has no keys, so streams need no ticket")
        ticket, seconds = server.gate.ticket(server.gate.key_of(dict(http.scope["headers"])))
        return Ticket(ticket=ticket, seconds=seconds)

    return api


async def _refuse_page(websocket: WebSocket) -> None:
    """Browsers hide the HTTP status of a refusal from the page, but report a close code and reason."""
    if websocket.headers.get("user-agent", "").startswith("Mozilla/"):  # as for every browser
        await websocket.accept()
        await websocket.close(4403, "pages of this origin may not open streams here; see --allowed-origins")
    else:
        detail = f"pages of {websocket.headers['origin']} may not open a stream here; see --allowed-origins"
        await _deny(websocket, problem_of(403, reason(403), detail))


async def _deny(websocket: WebSocket, answer: Answer) -> None:
    """Refuse the connection with an HTTP response if the server can send one, else with close code 4000 + status."""
    if "websocket.http.response" in (websocket.scope.get("extensions") or {}):
        await websocket.send_denial_response(answer.response())
    else:
        await websocket.accept()
        await websocket.close(4000 + answer.status)


class SlowReaderTimer:
    """Disconnects a client that stops reading while much data is waiting for it."""

    def __init__(self, link: Link, on_writable: Callable[[bool], None], seconds: float) -> None:
        self._link = link
        self._on_writable = on_writable
        self._seconds = seconds
        self._unsent = 0
        self._timer: asyncio.TimerHandle | None = None

    def on_writable(self, writable: bool) -> None:
        self.stop()
        if not writable:
            self._start()
        self._on_writable(writable)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _start(self) -> None:
        self._unsent = self._link.unsent()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._check)

    def _check(self) -> None:
        if self._link.unsent() < self._unsent:
            self._start()
        else:
            _log.info("disconnecting a client that does not read", unsent=self._unsent)
            self._link.abort()
