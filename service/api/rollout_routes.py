"""Rollouts over HTTP, as server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

import asyncio
from collections.abc import AsyncIterator, Callable
from time import perf_counter

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import StreamingResponse

from unroll.service.access.held_bytes import EVENTS, Holding
from unroll.service.api.admission import OwnId, tenant_of
from unroll.service.api.app_state import AppState
from unroll.service.api.bodies import parse_body
from unroll.service.api.error_responses import problem, problems
from unroll.service.api.native_routes import POSITION_HEADER, TIMEOUT_HEADER
from unroll.service.api.parameters import POSITION, position_of, split_reference, timeout_of
from unroll.service.api.request import Receive, read_request
from unroll.service.api.rollout import RolloutCall, RolloutRequest, Send, step_members
from unroll.service.core.errors import Cancelled, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.protocol import json
from unroll.service.protocol.tensors import Codec
from unroll.service.scheduler.session import Session

_ROUTE = "v1/rollout"
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter: nginx must not buffer
_EVENTS = {
    "description": "events `steps` (position, inputs, outputs), then `end` (position, reply_kept) or `error` (Problem)",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


def router(app: AppState) -> APIRouter:
    api = APIRouter(prefix="/v1", tags=["native v1"])

    @api.post(
        "/models/{model}/sessions/{session_id:segment}/rollout",
        summary="Roll out: time steps whose inputs are computed from previous outputs, as server-sent events",
        response_class=StreamingResponse,
        responses={200: _EVENTS, **problems(400, 404, 409, 410, 413, 415, 422, 429, 500, 503, 504)},
        openapi_extra={
            "requestBody": {
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RolloutRequest"}}},
                "required": True,
            },
            "parameters": [POSITION_HEADER, TIMEOUT_HEADER],
        },
    )
    async def rollout(model: str, own_id: OwnId, http: HttpRequest) -> StreamingResponse:
        started = perf_counter()
        try:
            request = await read_request(http.scope, http.receive, app.limits.max_body_bytes)
            wanted = parse_body(RolloutRequest, request, app.limits.max_json_bytes)
            wanted.position = position_of({"position": wanted.position}, request.whole_number(POSITION))
            events = _Events(wanted.send, Holding(app.held, EVENTS), tenant_of(http))
            call = RolloutCall(app, *split_reference(model), own_id, wanted, timeout_of(app, request), events)
            events.stop = call.cancel
            await call.begin()
            first = await _first(call, events, http.receive)
            if isinstance(first, UnrollError):  # nothing was sent yet, so it can be an ordinary error response
                raise first
        except UnrollError as error:
            app.count(_ROUTE, error.status, perf_counter() - started)
            raise
        content = _content(app, call, events, first, started)
        return StreamingResponse(content, headers=_HEADERS, media_type="text/event-stream")

    return api


class _Events:
    """The queue of one rollout's events: encoded events, then an error or None."""

    def __init__(self, send: Send, holding: Holding, tenant: str) -> None:
        self._holding = holding
        self._tenant = tenant
        self._refused = False
        self.stop: Callable[[], None] = lambda: None  # ends the rollout
        self.queue: asyncio.Queue[bytes | UnrollError | None] = asyncio.Queue()
        self._send: Send = send

    def check(self, session: Session) -> None: ...

    def on_steps(self, codec: Codec, position: int, inputs: Tensors, outputs: Tensors) -> None:
        if self._refused:
            return
        event = _event(b"steps", json.dump(step_members(codec, self._send, position, inputs, outputs)))
        if (error := self._holding.grow(self._holding.size + len(event), self._tenant)) is None:
            self.queue.put_nowait(event)
        else:
            self._refused = True
            self.on_error(error)
            asyncio.get_running_loop().call_soon(self.stop)

    def on_end(self, position: int, kept: bool) -> None:
        self.queue.put_nowait(_event(b"end", json.dump({"position": position, "reply_kept": kept})))
        self.queue.put_nowait(None)

    def on_error(self, error: UnrollError) -> None:
        self.queue.put_nowait(error)

    async def get(self) -> bytes | UnrollError | None:
        event = await self.queue.get()
        if isinstance(event, bytes) and self._holding.size:
            self._holding.resize(max(0, self._holding.size - len(event)))
        return event

    def drop(self) -> None:
        self._holding.resize(0)


async def _first(call: RolloutCall, events: _Events, receive: Receive) -> bytes | UnrollError | None:
    """Await the first event. If the client disconnects before it, cancel the rollout and raise Cancelled."""
    arrival, departure = asyncio.ensure_future(events.get()), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((arrival, departure), return_when=asyncio.FIRST_COMPLETED)
        if departure.done():
            raise Cancelled("the client disconnected")
        return arrival.result()
    except BaseException:
        call.cancel()
        events.drop()
        raise
    finally:
        arrival.cancel()
        departure.cancel()


async def _content(
    app: AppState, call: RolloutCall, events: _Events, first: bytes | UnrollError | None, started: float
) -> AsyncIterator[bytes]:
    """The response body. It is closed when the client disconnects, which cancels the rollout."""
    status, item = Cancelled.status, first  # the status if the client disconnects
    try:
        while item is not None:
            if isinstance(item, UnrollError):
                status = item.status
                yield _event(b"error", problem(item).body)
                return
            yield item
            item = await events.get()
        status = 200
    finally:
        call.cancel()
        events.drop()
        app.count(_ROUTE, status, perf_counter() - started)


def _event(name: bytes, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, data)
