"""Operations on a running server: load and unload models, drain, set the log level. Off by default."""

import logging
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from unroll.service.api.all_workers import MOST_BYTES, done_by_all, route_class
from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import open_inference_responses, problem_responses
from unroll.service.api.request import read_request
from unroll.service.core.errors import InvalidRequest
from unroll.service.protocol import json

_WORKERS = {504: "gateway_timeout: a worker does not answer; the others are done; send the request again"}
_DONE: dict[int | str, dict[str, Any]] = {
    200: {"description": "done"},
    **open_inference_responses(
        {
            400: "the body has parameters other than `unload_dependents`; models come only from the repository",
            404: "model_unknown: the repository has no such model",
            413: "body_too_large",
            503: "model_unavailable: its bundle is refused, for the reason given",
        }
        | _WORKERS
    ),
}


class LogLevel(BaseModel):
    """level: Minimum level of log lines."""

    model_config = ConfigDict(extra="forbid")

    level: Literal["debug", "info", "warning", "error"]


class Readiness(BaseModel):
    """ready: As in `/readyz`."""

    ready: bool


def router(app: AppState) -> APIRouter:
    api = APIRouter(route_class=route_class(app.workers, done_by_all))

    @api.post(
        "/v2/repository/models/{model}/load",
        tags=["Open Inference Protocol v2"],
        summary="Read the repository again, as at SIGHUP, and serve the versions of this model that it has",
        response_class=Response,
        responses=_DONE,
    )
    async def load(http: Request, model: str) -> Response:
        _refuse_contents(await _members(http))
        await app.repository.load(model)
        return Response()

    @api.post(
        "/v2/repository/models/{model}/unload",
        tags=["Open Inference Protocol v2"],
        summary="Accept no new sessions of this model; open ones continue until they end",
        response_class=Response,
        responses=_DONE,
    )
    async def unload(http: Request, model: str) -> Response:
        _refuse_contents(await _members(http))
        await app.repository.unload(model)
        return Response()

    @api.post(
        "/v1/admin/drain",
        tags=["administration"],
        summary="Become not ready and accept no new sessions; open ones continue until the process ends",
        responses=problem_responses({400: "malformed_request: the body has members", 413: "body_too_large"} | _WORKERS),
    )
    async def drain(http: Request) -> Readiness:
        if await _members(http):
            raise InvalidRequest("a drain takes no members; it lasts until the process ends")
        app.drain()
        return Readiness(ready=app.ready)

    @api.put(
        "/v1/admin/log-level",
        tags=["administration"],
        summary="Set the minimum level of log lines until the process ends",
        responses=problem_responses(
            {400: "malformed_request: there is no such level", 413: "body_too_large"} | _WORKERS
        ),
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": LogLevel.model_json_schema()}}}
        },
    )
    async def log_level(http: Request) -> LogLevel:
        try:
            body = LogLevel.model_validate(await _members(http))
        except ValidationError:
            raise InvalidRequest('the body must be {"level": …}, with debug, info, warning or error') from None
        logging.getLogger().setLevel(body.level.upper())
        return body

    return api


async def _members(http: Request) -> dict[str, Any]:
    """The members of the body; an empty body has none."""
    body = (await read_request(http.scope, http.receive, MOST_BYTES)).body
    return json.parse_object(body, MOST_BYTES) if body else {}


def _refuse_contents(body: dict[str, Any]) -> None:
    """Raises InvalidRequest if the request contains model files or a configuration, as Triton's clients can send."""
    given = body.get("parameters", {})
    if body.keys() - {"parameters"} or not isinstance(given, dict) or given.keys() - {"unload_dependents"}:
        raise InvalidRequest("models come only from the repository; a request may contain neither files nor a config")
