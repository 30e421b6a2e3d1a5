"""Wires the parts together: settings in, ASGI application out. The only file that knows all parts."""

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

from unroll import __version__
from unroll.service.api import health_routes, native_routes, open_inference_routes, statistics_routes
from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import open_inference_error, problem, problem_of, reason
from unroll.service.api.request import Answer, Disconnected
from unroll.service.api.stream import endpoint
from unroll.service.catalog.catalog import Catalog
from unroll.service.core.clock import Clock, MonotonicClock
from unroll.service.core.errors import UnrollError
from unroll.service.engine.runner import DeviceUnavailable, resolve_devices
from unroll.service.protocol import json
from unroll.service.settings import Settings
from unroll.service.state.sealed_snapshot import SnapshotKeys
from unroll.service.store.redis_store import RedisStore

_log = structlog.get_logger(__name__)


def build(settings: Settings, clock: Clock | None = None) -> tuple[FastAPI, AppState]:
    """Load every bundle and make the application, and what the transport needs of it.

    Raises CatalogError if a bundle is refused, DeviceUnavailable if the device asked for is not there.
    """
    devices, why = resolve_devices(settings.device)
    _log.info("device", devices=devices, why=why)
    clock = clock or MonotonicClock()
    try:
        catalog = _catalog(settings, clock, devices)
    except DeviceUnavailable as error:
        if settings.device != "auto":
            raise
        _log.warning("device", devices=["cpu"], why=str(error))
        catalog = _catalog(settings, clock, ["cpu"])
    keys = [key.get_secret_value().encode() for key in settings.snapshot_keys]
    server = AppState(
        catalog,
        settings.api_limits(),
        settings.durability or ("memory" if catalog.store is None else catalog.store.durability),
        SnapshotKeys(keys) if keys else None,
    )

    def crash() -> None:
        """A model without its loop would hang forever: exit, so that a process manager restarts the server."""
        server.ready, server.crashed = False, True
        signal.raise_signal(signal.SIGTERM)

    catalog.on_crash = crash

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if catalog.store is not None:
            await catalog.store.start()
        running = asyncio.create_task(catalog.run(), name="catalog")
        running.add_done_callback(catalog.watch)
        server.ready = True
        yield
        # No client is connected and no request is in flight, unless the drain timed out.
        server.drain()
        running.cancel()
        await asyncio.wait([running])
        if settings.state_file is not None:
            written = catalog.overflow.save(settings.state_file, catalog)
            _log.info("sessions written", path=str(settings.state_file), sessions=written)
        if catalog.store is not None:
            await catalog.store.stop()
        catalog.shut_down()

    return _fastapi(server, lifespan), server


def _catalog(settings: Settings, clock: Clock, devices: Sequence[str]) -> Catalog:
    places = [(device, ThreadPoolExecutor(1, thread_name_prefix=f"engine {device}")) for device in devices]
    config = settings.store_config()
    store = None if config is None else RedisStore(config)
    catalog = Catalog(settings.repository, settings.model_options(), clock, places, store)
    catalog.load_all()
    if settings.state_file is not None and settings.state_file.exists():
        read = catalog.overflow.load(settings.state_file)
        _log.info("sessions read", path=str(settings.state_file), sessions=read)
    return catalog


def _fastapi(server: AppState, lifespan: Any) -> FastAPI:
    app = FastAPI(
        title="Unroll",
        version=__version__,
        summary="Stacked GRU/LSTM models: whole sequences, and streams whose state the server keeps.",
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.include_router(native_routes.router(server))
    app.include_router(endpoint.router(server))
    app.include_router(statistics_routes.router(server))
    app.include_router(open_inference_routes.router(server, __version__))
    app.include_router(health_routes.router(server))
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]

    @app.exception_handler(UnrollError)
    async def unroll_error(request: Request, error: UnrollError) -> Response:
        return (open_inference_error(error) if _is_v2(request) else problem(error)).response()

    @app.exception_handler(Disconnected)
    async def gone(request: Request, error: Disconnected) -> Response:
        return Response(status_code=499)  # the client has disconnected

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = reason(error.status_code)
        answer = problem_of(error.status_code, code, f"{request.method} {request.url.path}: {error.detail}")
        if _is_v2(request):
            body = json.dump({"error": str(error.detail), "code": code})
            answer = Answer(error.status_code, b"application/json", body)
        response = answer.response()
        response.headers.update(error.headers or {})
        return response

    return app


def _is_v2(request: Request) -> bool:
    return request.url.path.startswith("/v2")


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the bodies that the hot routes read without FastAPI."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for operation in (operation for path in document["paths"].values() for operation in path.values()):
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]  # FastAPI's default, which a path of two strings cannot cause
        schemas = document["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for model in native_routes.DOCUMENTED:
            schemas.setdefault(model.__name__, model.model_json_schema())
        app.openapi_schema = document
    return app.openapi_schema
