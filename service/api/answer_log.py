"""Writes answered requests to the request log."""

from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import reason
from unroll.service.api.parameters import split_reference
from unroll.service.core.errors import UnrollError
from unroll.service.telemetry.request_log import RequestLog

#: Key in an ASGI scope: the error that the request was answered with; None if the request is already logged.
ERROR = "unroll.error"


def log_answer(log: RequestLog, route: str, status: int, error: UnrollError | None, **known: str | int | None) -> None:
    """Log an answer if its status reaches the log's minimum. known: the request's `model`, `session`, `position`."""
    if status < log.least_status:
        return
    code = error.code if error is not None else reason(status) if status >= 400 else None
    expected = None if error is None else error.details.get("expected")
    log.write(route, status, code, **known, expected=expected)


class LogAnswers:
    """Middleware that logs the requests handled by FastAPI."""

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._log = state.request_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_log(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._write(scope, message["status"])
            await send(message)

        await self._app(scope, receive, send_and_log if scope["type"] == "http" else send)

    def _write(self, scope: Scope, status: int) -> None:
        error = scope.get(ERROR)
        if ERROR in scope and error is None:
            return
        route, names = scope.get("route"), _names(scope.get("path_params", {}))
        template = getattr(route, "path_format", "no such path")
        log_answer(self._log, f"{scope['method']} {template}", status, error, **names)


def _names(path_params: Mapping[str, Any]) -> dict[str, str | int | None]:
    model = path_params.get("model")
    return {
        "model": None if model is None else split_reference(model)[0],
        "session": path_params.get("session_id"),
    }
