"""The inference routes: the handler and the error format of each path. Called by the transport and by FastAPI."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import structlog
from fastapi import Request as HttpRequest
from fastapi import Response

from unroll.service.api.answer_log import ERROR, log_answer
from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import open_inference_error, problem
from unroll.service.api.infer import infer
from unroll.service.api.parameters import split_reference
from unroll.service.api.path_segments import split
from unroll.service.api.request import Answer, Cancel, Request, Respond, answered, nothing_to_cancel, read_request
from unroll.service.api.session_operations import close_session, open_session
from unroll.service.api.steps import sequences, steps
from unroll.service.core.errors import EngineFailed, NeedsStoreLookup, UnrollError
from unroll.service.sessions.attempts import Attempts

_log = structlog.get_logger(__name__)

#: A path, split at its slashes.
Path = list[str]


@dataclass(frozen=True, slots=True)
class Route:
    """An inference route.

    Attributes:
        name: Its name in metrics and logs.
        pattern: The segments of its paths; `*` is any that is not empty.
        begin: Starts the work on a request; may raise UnrollError.
        failure: Converts an error to an answer.
        takes_document: Whether it takes long JSON as a document; otherwise it parses the text itself.
    """

    name: str
    pattern: Path
    begin: Callable[[AppState, Path, Request, Respond], Cancel]
    failure: Callable[[UnrollError], Answer]
    method: str = "POST"
    takes_document: bool = True

    def matches(self, path: Path) -> bool:
        return all(
            segment == part or (part == "*" and segment) for segment, part in zip(path, self.pattern, strict=True)
        )

    def handle(self, app: AppState, path: Path, request: Request, respond: Respond) -> None:
        """Start the work; `request.cancel` cancels it. `respond` is always called exactly once.

        With a store, the request may be handled again before that, so it keeps its headers and body.
        """
        request.cancel = nothing_to_cancel
        if app.sessions.has_store:
            request.again = partial(_handle_again, self, app, path, request, respond)
        try:
            request.cancel = self.attempt(app, path, request, respond)
        except NeedsStoreLookup as needed:
            _DurableCall(self, app, path, request, respond).attempts().look_up(needed.session_id)

    def attempt(self, app: AppState, path: Path, request: Request, respond: Respond) -> Cancel:
        """Raises NeedsStoreLookup."""
        try:
            return self.begin(app, path, request, respond)
        except NeedsStoreLookup:
            raise
        except Exception as error:  # noqa: BLE001 every request must be answered
            respond(self.answer_to(error))
        return nothing_to_cancel

    def answer_to(self, error: Exception) -> Answer:
        if isinstance(error, UnrollError):
            return self.failure(error)
        _log.error("unexpected error", route=self.name, exc_info=error)
        return self.failure(EngineFailed("the server failed on this request; its log has the reason"))


class _DurableCall(Request):
    """A request that is handled again, after a store lookup or because another replica updated its session."""

    def __init__(self, route: Route, app: AppState, path: Path, request: Request, respond: Respond) -> None:
        super().__init__(request.headers, request.body, request.tenant)
        self.document = request.document
        self._route = route
        self._app = app
        self._path = path
        self._original = request
        self._respond = respond
        self._begun: Cancel = nothing_to_cancel
        self._over = False
        request.cancel = self._stop

    def attempts(self) -> Attempts:
        attempts = Attempts(self._app.sessions, split_reference(self._path[3])[0], self._begin, self._fail)
        self.again = attempts.again
        return attempts

    def _stop(self) -> None:
        self._over = True
        self._begun()

    def _begin(self) -> None:
        if self._over:
            return
        self._begun = nothing_to_cancel
        cancel = self._route.attempt(self._app, self._path, self, self._finish)
        if not self._over:
            self._begun = cancel

    def _fail(self, error: UnrollError) -> None:
        if not self._over:
            self._finish(self._route.failure(error))

    def _finish(self, answer: Answer) -> None:
        """Answer, and break the reference cycles, which would otherwise live until garbage collection."""
        self._over = True
        self._begun, self.again = nothing_to_cancel, None
        self._original.session, self._original.position = self.session, self.position
        self._respond(answer)


def _handle_again(route: Route, app: AppState, path: Path, request: Request, respond: Respond) -> bool:
    return _DurableCall(route, app, path, request, respond).attempts().again()


def _finish(route: Route, answer: Coroutine[Any, Any, Answer], respond: Respond) -> Cancel:
    """Answer in a task, because the store may have to be waited for."""

    async def finish() -> None:
        try:
            found = await answer
        except Exception as error:  # noqa: BLE001 every request must be answered
            found = route.answer_to(error)
        respond(found)

    task = asyncio.create_task(finish(), name=route.name)
    return lambda: task  # which keeps it alive: it is not cancelled when its client disconnects


_STEPS = Route(
    "v1/steps",
    split("/v1/models/*/sessions/*/steps"),
    lambda app, path, request, respond: steps(app, path[3], path[5], request, respond),
    problem,
)
_SEQUENCES = Route(
    "v1/sequences",
    split("/v1/models/*/sequences"),
    lambda app, path, request, respond: sequences(app, path[3], request, respond),
    problem,
)
_OPEN: Route = Route(
    "v1/sessions",
    split("/v1/models/*/sessions"),
    lambda app, path, request, respond: _finish(_OPEN, open_session(app, path[3], request), respond),
    problem,
    takes_document=False,
)
_CLOSE: Route = Route(
    "v1/sessions",
    split("/v1/models/*/sessions/*"),
    lambda app, path, request, respond: _finish(_CLOSE, close_session(app, path[3], request.own(path[5])), respond),
    problem,
    "DELETE",
)
_INFER = Route(
    "v2/infer",
    split("/v2/models/*/infer"),
    lambda app, path, request, respond: infer(app, path[3], None, request, respond),
    open_inference_error,
)
_INFER_VERSION = Route(
    "v2/infer",
    split("/v2/models/*/versions/*/infer"),
    lambda app, path, request, respond: infer(app, path[3], path[5], request, respond),
    open_inference_error,
)

_ROUTES = (_STEPS, _SEQUENCES, _OPEN, _CLOSE, _INFER, _INFER_VERSION)


def find(method: str, path: Path) -> Route | None:
    """The inference route of a request, if it is for one."""
    for route in _ROUTES:
        if route.method == method and len(route.pattern) == len(path) and route.matches(path):
            return route
    return None


def log(app: AppState, route: Route, path: Path, request: Request, answer: Answer) -> None:
    session = path[5] if route in (_STEPS, _CLOSE) else request.session
    known = {"model": split_reference(path[3])[0], "session": session, "position": request.position}
    log_answer(app.request_log, route.name, answer.status, answer.error, **known)


async def respond(app: AppState, http: HttpRequest) -> Response:
    """Handle a request to an inference route; cancelling the caller cancels the work."""
    request = await read_request(http.scope, http.receive, app.limits.max_body_bytes)
    http.scope[ERROR] = None  # logged below, not by the middleware
    parts = split(http.scope["path"])  # `http.url` drops tabs and line ends
    route = find(http.method, parts)
    assert route is not None, parts
    started = perf_counter()

    def begin(respond: Respond) -> Cancel:
        route.handle(app, parts, request, respond)
        return lambda: request.cancel()

    found = await answered(begin)
    request.again = None  # a reference cycle, which would otherwise live until garbage collection
    while found.pieces is not None:
        found.encode_slice()
        await asyncio.sleep(0)
    app.count(route.name, found.status, perf_counter() - started)
    log(app, route, parts, request, found)
    return found.response()
