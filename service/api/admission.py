"""Authenticates the requests that FastAPI handles. The transport does so itself for those that it handles."""

import asyncio
from typing import Annotated, Any

from fastapi import Depends
from fastapi import Request as HttpRequest
from fastapi.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from unroll.service.access import keys
from unroll.service.access.keys import Key
from unroll.service.access.tickets import TICKET_PROTOCOL
from unroll.service.api.answer_log import ERROR
from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import (
    open_inference_error,
    open_inference_responses,
    problem,
    problem_responses,
)
from unroll.service.api.request import LONG_BODIES, TENANT, Headers
from unroll.service.core.errors import UnrollError
from unroll.service.core.session_ids import owned

#: Public paths: health, and the documentation of the API.
_PUBLIC = ("/", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/openapi.json", "/docs", "/redoc")
_PUBLIC_FOLDERS = ("/docs/", "/page/")
#: Methods that change nothing.
_SAFE = ("GET", "HEAD", "OPTIONS")
_SCOPES = {"/metrics": keys.METRICS, "/v1/admin/sessions": keys.SESSIONS_ADMIN}
_SCOPES_OF_FOLDERS = {"/v2/repository/models/": keys.MODELS_ADMIN, "/v1/admin/": keys.SERVER_ADMIN}


def scope_of(path: str) -> keys.Scope | None:
    """The scope that a key needs for this path; None if it needs no key."""
    if path in _PUBLIC or path.startswith(_PUBLIC_FOLDERS):
        return None
    if path in _SCOPES:
        return _SCOPES[path]
    if path.startswith("/v2/models/") and path.endswith("/stats"):  # they count the work of all tenants
        return keys.METRICS
    return next((scope for folder, scope in _SCOPES_OF_FOLDERS.items() if path.startswith(folder)), keys.INFER)


def refusals(path: str) -> dict[str, Any]:
    """The refusals of a path, for the OpenAPI document."""
    if (scope := scope_of(path)) is None:
        return {}
    meanings = {
        401: "unauthenticated: the server requires a key, and the request has none or an unknown one",
        403: f"forbidden: the key lacks the scope {scope}; or host_refused, origin_refused",
        503: "keys_unavailable: the key that signed the JWT is not known yet; retry after Retry-After seconds",
    }
    responses = open_inference_responses if path.startswith("/v2") else problem_responses
    return {
        str(status): {name: answer[name] for name in ("description", "content")}
        for status, answer in responses(meanings).items()
    }


class Admission:
    """Middleware for HTTP. Streams use `admit_stream`."""

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._gate = state.gate
        self._long_bodies = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers: Headers = dict(scope["headers"])
            scope[LONG_BODIES] = self._long_bodies
            try:
                needed = scope_of(scope["path"])
                if needed is None:
                    self._gate.check_host(headers)
                else:
                    scope[TENANT] = self._gate.admit(headers, needed, changes=scope["method"] not in _SAFE)
            except UnrollError as error:
                scope[ERROR] = error
                is_v2 = scope["path"].startswith("/v2")
                answer = (open_inference_error if is_v2 else problem)(error)
                await answer.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def admit_stream(app: AppState, connection: HTTPConnection) -> Key | None:
    """The API key of a stream, or of a ticket among its offered subprotocols; None if the server has no keys.

    Raises:
        HostRefused, Unauthenticated, Forbidden: See `Gate.admit`.
    """
    headers: Headers = dict(connection.scope["headers"])
    for protocol in connection.scope.get("subprotocols", ()):
        if protocol.startswith(TICKET_PROTOCOL):
            app.gate.check_host(headers)
            return app.gate.admit_ticket(protocol.removeprefix(TICKET_PROTOCOL), keys.INFER)
    app.gate.admit(headers, keys.INFER, changes=True)
    return app.gate.key_of(headers) if app.gate.has_keys else None


def tenant_of(http: HttpRequest) -> str:
    """The tenant of an admitted request; empty without keys."""
    tenant: str = http.scope.get(TENANT, "")
    return tenant


async def _own_id(http: HttpRequest, session_id: str) -> str:
    return owned(tenant_of(http), session_id)


#: The session id from a route's path, as the server's internal id.
OwnId = Annotated[str, Depends(_own_id)]
