"""Liveness and readiness, and in a separate router, metrics."""

from typing import Any

from fastapi import APIRouter, Response

from unroll.service.api.all_workers import METRICS_TEXT, metrics_of_all, route_class
from unroll.service.api.app_state import AppState
from unroll.service.api.http_methods import add_probe
from unroll.service.telemetry.metrics import Collector

_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"description": "not ready: starting or stopping"}}


def router(app: AppState) -> APIRouter:
    api = APIRouter(tags=["health"])

    async def live() -> dict[str, bool]:
        return {"live": True}

    async def ready(response: Response) -> dict[str, bool]:
        response.status_code = 200 if app.ready else 503
        return {"ready": app.ready}

    add_probe(api, "/livez", live, summary="The process answers")
    add_probe(api, "/v2/health/live", live, summary="The process answers (Open Inference Protocol)")
    loaded = "Every model is loaded, its loop runs, and the store has answered"
    add_probe(api, "/readyz", ready, summary=loaded, responses=_NOT_READY)
    add_probe(api, "/v2/health/ready", ready, summary=f"{loaded} (Open Inference Protocol)", responses=_NOT_READY)

    return api


def metrics_router(app: AppState) -> APIRouter:
    api = APIRouter(tags=["health"], route_class=route_class(app.workers, metrics_of_all))
    collector = Collector(
        lambda: [model.current_figures() for model in app.models],
        app.requests,
        app.streams,
        app.sessions.directory.spilled,
        app.models.problems,
        app.sessions.store_figures,
        app.held.by_kind,
        app.connections,
    )

    @api.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        return Response(b"".join(await app.turns.make(collector.exposition())), media_type=METRICS_TEXT)

    return api
