"""Wires the parts together, from settings to an ASGI application. The only file that knows all parts."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Message, Receive, Scope, Send

from unroll import __version__
from unroll.service.access.gate import Gate
from unroll.service.api import (
    absent_routes,
    admin_routes,
    health_routes,
    native_routes,
    open_inference_routes,
    operator_routes,
    page_routes,
    repository_routes,
    rollout_routes,
    statistics_routes,
)
from unroll.service.api.admission import Admission, refusals
from unroll.service.api.all_workers import AllWorkers
from unroll.service.api.answer_log import ERROR, LogAnswers
from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import http_error, open_inference_error, problem
from unroll.service.api.http_methods import HeadAsGet, allowed_methods
from unroll.service.api.path_segments import EncodedSlashes
from unroll.service.api.request import Disconnected
from unroll.service.api.stream import endpoint
from unroll.service.core.clock import Clock, MonotonicClock
from unroll.service.core.errors import UnrollError
from unroll.service.engine.runner import DeviceUnavailable, resolve_devices
from unroll.service.models.loading import ModelLoader
from unroll.service.models.repository import ModelRepository
from unroll.service.models.versions import ModelVersions
from unroll.service.sessions.directory import SessionDirectory
from unroll.service.sessions.durable import DurableSessions
from unroll.service.sessions.in_memory import MemorySessions
from unroll.service.sessions.memory_pages import MemoryPages
from unroll.service.sessions.spilled import SpilledSessions
from unroll.service.settings import Settings
from unroll.service.state.sealed_snapshot import SnapshotKeys
from unroll.service.store.interface import Pages, Store, StoreRefused
from unroll.service.store.opening import open_store
from unroll.service.store.record import MEMORY, STORED
from unroll.service.store.state_file import StateFile
from unroll.service.telemetry.request_log import RequestLog

_log = structlog.get_logger(__name__)

#: Response headers that scripts of other origins may read.
_EXPOSED = ("Allow", "Retry-After", "Unroll-Position", "Unroll-Reply-Kept", "Unroll-Snapshot-Length")
#: Seconds for which browsers may cache a preflight response.
_PREFLIGHT_SECONDS = 600


def build(
    settings: Settings,
    clock: Clock | None = None,
    workers: AllWorkers | None = None,
    ticket_secret: bytes | None = None,
) -> tuple[FastAPI, AppState]:
    """Load every bundle, and create the application and the state that it shares with the transport.

    Args:
        workers: All worker processes, if there are several.
        ticket_secret: Secret shared by all workers.

    Raises:
        RepositoryError: See `ModelRepository.load_all`.
        DeviceUnavailable: The requested device cannot be used.
        ValueError: The device lacks the requested precision, or the keys file cannot be used.
    """
    gate = settings.gate(ticket_secret)
    clock = clock or MonotonicClock()

    def crash() -> None:
        """Exit, so that a process manager restarts the server: a model without its loop would hang forever."""
        state.ready, state.crashed = False, True
        signal.raise_signal(signal.SIGTERM)

    with ExitStack() as on_error:
        state_file = None
        if settings.state_file is not None:
            state_file = StateFile(settings.state_file)
            on_error.callback(state_file.close)
        config = settings.store_config()
        store = None if config is None else open_store(config)
        repository, models, sessions = _load(settings, store, clock, crash, gate)
        if state_file is not None:
            sessions.directory.spilled.load(state_file)
        on_error.pop_all()
    keys = [key.get_secret_value().encode() for key in settings.snapshot_keys]
    state = AppState(
        models,
        repository,
        sessions,
        settings.api_limits(),
        settings.default_durability,
        SnapshotKeys(keys) if keys else None,
        workers,
        gate,
        RequestLog(settings.log_requests),
    )
    app = _fastapi(state, lambda _: _lifespan(state, state_file, settings.store_timeout))
    _add_inference(app, state)
    if settings.shows_page:
        app.include_router(page_routes.router())
    if settings.allowed_origins:
        _allow_pages_of(app, settings.allowed_origins)
    operator = app.state.operator = app if settings.admin_port is None else _fastapi(state, None)
    operator.include_router(health_routes.metrics_router(state))
    _add_administration(operator, settings, state, store, clock)
    loads = settings.offers_operations and operator is app
    app.include_router(absent_routes.router(absent_routes.LOADING if loads else ()))
    return app, state


class _Cors(CORSMiddleware):
    """Also lets caches know that answers depend on the origin, even those to requests without one."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def vary(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if "vary" not in headers:
                    headers["Vary"] = "Origin"
            await send(message)

        await super().__call__(scope, receive, send if self.allow_all_origins else vary)


def _allow_pages_of(app: FastAPI, origins: Sequence[str]) -> None:
    app.add_middleware(
        _Cors,
        allow_origins=origins,
        allow_methods=("DELETE", "GET", "POST", "PUT"),
        allow_headers=("*",),
        expose_headers=_EXPOSED,
        max_age=_PREFLIGHT_SECONDS,
    )


def _add_inference(app: FastAPI, state: AppState) -> None:
    app.include_router(native_routes.router(state))
    app.include_router(rollout_routes.router(state))
    app.include_router(endpoint.router(state))
    app.include_router(statistics_routes.router(state))
    app.include_router(repository_routes.router(state))
    app.include_router(open_inference_routes.router(state, __version__))


def _add_administration(app: FastAPI, settings: Settings, state: AppState, store: Store | None, clock: Clock) -> None:
    if settings.offers_operations:
        app.include_router(operator_routes.router(state))
    if settings.admin:
        idle_timeout = settings.idle_timeout or None
        pages: dict[str, Pages] = {MEMORY: MemoryPages(state.sessions.directory, clock, idle_timeout)}
        if store is not None:
            pages[STORED] = store
        app.include_router(admin_routes.router(state, pages, idle_timeout))


_Loaded = tuple[ModelRepository, ModelVersions, MemorySessions]


def _load(settings: Settings, store: Store | None, clock: Clock, crash: Callable[[], None], gate: Gate) -> _Loaded:
    """Load on the requested devices. With `auto`, fall back to the CPU if they do not work."""
    devices, why = resolve_devices(settings.device)
    _log.info("device", devices=devices, why=why)
    try:
        return _load_on(devices, settings, store, clock, crash, gate)
    except DeviceUnavailable as error:
        if settings.device != "auto":
            raise
        _log.warning("device", devices=["cpu"], why=str(error))
        return _load_on(["cpu"], settings, store, clock, crash, gate)


def _load_on(
    devices: Sequence[str],
    settings: Settings,
    store: Store | None,
    clock: Clock,
    crash: Callable[[], None],
    gate: Gate,
) -> _Loaded:
    options = settings.model_options()
    for device in devices:
        options.engine.check(device)
    models = ModelVersions()
    spilled = SpilledSessions(options.spill_bytes, options.sessions.idle_timeout, clock, models, store)
    directory = SessionDirectory(models, spilled, clock)
    sessions = MemorySessions(directory, gate.quota) if store is None else DurableSessions(directory, store, gate.quota)
    engine_threads = [(device, ThreadPoolExecutor(1, thread_name_prefix=f"engine {device}")) for device in devices]
    loader = ModelLoader(options, clock, engine_threads, store, spilled.take_in, sessions.is_verified)
    serve = {name: str(version) for name, version in settings.serve.items()}
    repository = ModelRepository(settings.repository, models, loader, spilled.has, crash, serve, strict=settings.strict)
    repository.load_all()
    return repository, models, sessions


@asynccontextmanager
async def _lifespan(state: AppState, state_file: StateFile | None, store_timeout: float) -> AsyncIterator[None]:
    running = [
        asyncio.create_task(_become_ready(state), name="start of the store"),
        asyncio.create_task(state.repository.run(), name="repository"),
        asyncio.create_task(state.sessions.run(), name="sessions"),
        asyncio.create_task(state.gate.run(), name="keys"),
    ]
    for task in running:
        task.add_done_callback(state.repository.watch)
    if state_file is not None:
        state_file.remove()
    await asyncio.wait(running[:1], timeout=store_timeout)  # if the store does not answer, start without being ready
    yield
    # No client is connected and no request is in flight, unless the drain timed out.
    state.drain()
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    await state.sessions.finish()
    if state_file is not None:
        state.failed = not state.sessions.directory.spilled.save(state_file)
        state_file.close()
    await state.sessions.stop()
    state.repository.shut_down()


async def _become_ready(state: AppState) -> None:
    """Become ready when the store has answered once. A misconfigured store ends the process."""
    try:
        await state.sessions.start()
    except StoreRefused as error:
        _log.error("not started", reason=str(error))
        state.failed = True
        signal.raise_signal(signal.SIGTERM)
    else:
        state.ready = not state.draining


def _fastapi(state: AppState, lifespan: Any) -> FastAPI:
    app = FastAPIOffline(  # /docs and /redoc load their scripts from this server
        static_url="/docs/assets",
        title="Unroll",
        version=__version__,
        summary="Stacked GRU/LSTM models: whole sequences, and streams whose state the server keeps.",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would repeat the client's Host header
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.add_middleware(Admission, state=state)
    app.add_middleware(LogAnswers, state=state)
    app.add_middleware(HeadAsGet)
    app.add_middleware(EncodedSlashes)
    app.include_router(health_routes.router(state))
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]

    @app.exception_handler(UnrollError)
    async def unroll_error(request: Request, error: UnrollError) -> Response:
        request.scope[ERROR] = error
        return (open_inference_error(error) if _is_v2(request) else problem(error)).response()

    @app.exception_handler(Disconnected)
    async def gone(request: Request, error: Disconnected) -> Response:
        return Response(status_code=499)  # the client has disconnected

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = allowed_methods(app.routes, request.scope)
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
        detail = f"{request.method} {request.url.path}: {error.detail}"
        response = http_error(error.status_code, detail, _is_v2(request)).response()
        response.headers.update(headers)
        return response

    return app


def _is_v2(request: Request) -> bool:
    return request.url.path.startswith("/v2")


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's OpenAPI document, plus the bodies that the hot routes read without FastAPI."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for path, operation in ((path, o) for path, found in document["paths"].items() for o in found.values()):
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]  # FastAPI's default, which string parameters cannot cause
            operation["responses"] = refusals(path) | operation["responses"]
        _link_sessions(document["paths"])
        schemas = document.setdefault("components", {}).setdefault("schemas", {})  # a metrics-only port has none
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for model in native_routes.DOCUMENTED:
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            for name, part in {model.__name__: schema, **schema.pop("$defs", {})}.items():
                schemas.setdefault(name, part)
        app.openapi_schema = document
    return app.openapi_schema


def _link_sessions(paths: dict[str, Any]) -> None:
    ids = {"model": "$request.path.model", "session_id": "$response.body#/session_id"}
    found = [operation for path, one in paths.items() if "{session_id}" in path for operation in one.values()]
    if found:
        links = {one["operationId"]: {"operationId": one["operationId"], "parameters": ids} for one in found}
        paths["/v1/models/{model}/sessions"]["post"]["responses"]["201"]["links"] = links
