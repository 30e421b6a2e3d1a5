"""Lists sessions for operators; with keys, those of the key's tenant. Off by default."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from unroll.service.api.admission import tenant_of
from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import problem_responses
from unroll.service.core.errors import InvalidRequest
from unroll.service.protocol import json
from unroll.service.sessions.selection import Selection, select
from unroll.service.store.interface import Pages

_MOST = 1000
#: Query parameters, with their types.
_NUMBERS = {"limit": int, "min_idle": float, "min_position": int, "max_position": int}
_TEXTS = ("model", "durability", "after")
_PARAMETERS = [
    {"name": name, "in": "query", "schema": {"type": "integer" if kind is int else "number"}}
    for name, kind in _NUMBERS.items()
] + [{"name": name, "in": "query", "schema": {"type": "string"}} for name in _TEXTS]


def router(app: AppState, pages: Mapping[str, Pages], idle_timeout: float | None) -> APIRouter:
    """pages: lists the sessions of each durability."""
    api = APIRouter(prefix="/v1/admin", tags=["administration"])

    @api.get(
        "/sessions",
        response_model=dict[str, Any],
        summary="Open sessions, a page at a time, without their states",
        description="`DELETE /v1/models/{model}/sessions/{session_id}` closes one.",
        responses=problem_responses(
            {
                400: "malformed_request: a parameter is unknown or invalid",
                422: "durability_unavailable",
                503: "store_unavailable",
            }
        ),
        openapi_extra={"parameters": _PARAMETERS},
    )
    async def sessions(http: Request) -> Any:
        query = _parse(http)
        durability = app.durability_of(query.get("durability"))
        selection = Selection(
            query.get("model"),
            query.get("min_idle"),
            query.get("min_position", 0),
            query.get("max_position"),
            idle_timeout,
            tenant_of(http),
        )
        limit, after = query.get("limit", 100), query.get("after", "")
        if not 1 <= limit <= _MOST:
            raise InvalidRequest(f"limit must be from 1 to {_MOST}; use `after` for more")
        found, after = await select(pages[durability], selection, after, limit)
        return Response(json.dump(found.document(after)), media_type="application/json")

    return api


def _parse(http: Request) -> dict[str, Any]:
    """Parse the query string. Raises InvalidRequest."""
    parsed: dict[str, Any] = {}
    for name, value in http.query_params.items():
        if name in _TEXTS:
            parsed[name] = value
            continue
        if name not in _NUMBERS:
            raise InvalidRequest(f"unknown parameter {name!r}; use {', '.join((*_NUMBERS, *_TEXTS))}")
        try:
            parsed[name] = _NUMBERS[name](value)
        except ValueError:
            raise InvalidRequest(f"{name} must be a number, not {value!r}") from None
    return parsed
