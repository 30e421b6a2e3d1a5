"""The inference routes straight from ASGI: one dictionary look-up, no router, no validation framework.

Everything else, and every path that is not quite one of these, goes on to FastAPI.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import perf_counter

from service.api.errors import open_inference_error, problem
from service.api.http import Answer, Disconnected, Receive, Request, Scope, Send, read_request
from service.api.infer import infer
from service.api.server import Server
from service.api.steps import sequences, steps
from service.core.errors import UnrollError
from service.telemetry.metrics import RequestFigures

#: A larger body is work enough that the client's going away should stop it; watching costs a task.
WATCH_BYTES = 16_384

Route = Callable[[Server, list[str], Request], Awaitable[Answer]]
ErrorForm = Callable[[UnrollError], Answer]


async def _steps(server: Server, path: list[str], request: Request) -> Answer:
    return await steps(server, path[3], path[5], request)


async def _sequences(server: Server, path: list[str], request: Request) -> Answer:
    return await sequences(server, path[3], request)


async def _infer(server: Server, path: list[str], request: Request) -> Answer:
    return await infer(server, path[3], path[5] if len(path) > 6 else None, request)


#: By what follows the model's name and, in a path split at "/", by the fixed parts and where they are.
_ROUTES: dict[str, list[tuple[int, dict[int, str], str, Route, ErrorForm]]] = {
    "steps": [(7, {1: "v1", 2: "models", 4: "sessions"}, "v1/steps", _steps, problem)],
    "sequences": [(5, {1: "v1", 2: "models"}, "v1/sequences", _sequences, problem)],
    "infer": [
        (5, {1: "v2", 2: "models"}, "v2/infer", _infer, open_inference_error),
        (7, {1: "v2", 2: "models", 4: "versions"}, "v2/infer", _infer, open_inference_error),
    ],
}


class Front:
    def __init__(self, server: Server, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.server = server
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            path = scope["path"].split("/")
            for length, fixed, name, route, error_form in _ROUTES.get(path[-1], ()):
                if len(path) == length and all(path[i] == part for i, part in fixed.items()):
                    await self._answer(name, route, error_form, path, scope, receive, send)
                    return
        with suppress(Disconnected):
            await self._app(scope, receive, send)

    async def _answer(
        self,
        name: str,
        route: Route,
        error_form: ErrorForm,
        path: list[str],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        started = perf_counter()
        try:
            request = await read_request(scope, receive, self.server.limits.max_body_bytes)
            if len(request.body) < WATCH_BYTES:
                answer = await route(self.server, path, request)
            else:
                answer = await _unless_gone(route(self.server, path, request), receive)
        except UnrollError as error:
            answer = error_form(error)
        except Disconnected:
            return
        await answer.send(send)
        figures = self.server.requests.get(name)
        if figures is None:
            figures = self.server.requests.setdefault(name, RequestFigures())
        figures.observe(answer.status, perf_counter() - started)


async def _unless_gone(work: Awaitable[Answer], receive: Receive) -> Answer:
    """The answer, or Disconnected as soon as the client is gone; the work is then cancelled."""
    answering = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(receive())  # the body is read: the next message can only be a disconnect
    try:
        await asyncio.wait({answering, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise Disconnected
        return answering.result()
    finally:
        listening.cancel()
        answering.cancel()
