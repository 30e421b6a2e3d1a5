"""HTTP methods common to all paths: HEAD as GET without the body, OPTIONS, and 405 with the allowed methods."""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send


class HeadAsGet:
    """Middleware that treats HEAD as GET; the server drops the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


def allowed_methods(routes: Sequence[BaseRoute], scope: Scope) -> str:
    """The value of the header `Allow` for the request's path."""
    methods = {
        method
        for method in ("DELETE", "GET", "PATCH", "POST", "PUT")
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)
    }
    return ", ".join(sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))


def add_probe(api: APIRouter, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
    """Add a GET route for load balancers. Some probe with OPTIONS and check only the status."""
    api.add_api_route(path, endpoint, methods=["GET"], **options)
    api.add_api_route(path, endpoint, methods=["OPTIONS"], dependencies=[Depends(_allow)], include_in_schema=False)


def _allow(response: Response) -> None:
    response.headers["Allow"] = "GET, HEAD, OPTIONS"
