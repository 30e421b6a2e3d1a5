"""Liveness and readiness, and in a separate router, metrics."""

from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

from unroll.service.api.app_state import AppState
from unroll.service.api.http_methods import add_probe
from unroll.service.api.worker_metrics import WorkerMetrics
from unroll.service.telemetry.metrics import Collector

_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"description": "not ready: starting or stopping"}}

#: Media type of Prometheus's text format.
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


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


def metrics_router(app: AppState, workers: WorkerMetrics | None) -> APIRouter:
    """workers: collects the metrics of all workers; None unless each has its own port."""
    api = APIRouter(tags=["health"])
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
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            404: {"description": "several workers share this port, without --worker-port"},
        },
    )
    async def metrics(request: Request) -> Response:
        if app.shared_port is not None and request.scope["server"][1] == app.shared_port:
            if workers is None:
                raise HTTPException(404, "several workers share this port; use --worker-port for the metrics of all")
            names = (b"authorization", b"x-api-key")
            keys = [b"%b: %b\r\n" % header for header in request.scope["headers"] if header[0] in names]
            return Response(await workers.exposition(b"".join(keys)), media_type=_TEXT)
        return Response(b"".join(await app.turns.make(collector.exposition())), media_type=_TEXT)

    return api
