"""How uvicorn runs the application: with our protocols, and without what a step does not need."""

import copy

import uvicorn
from fastapi import FastAPI

from unroll.service.access.certificate import Tls
from unroll.service.api.app_state import AppState
from unroll.service.transport.connections import ConnectionLimits
from unroll.service.transport.http import http_protocol, operator_protocol
from unroll.service.transport.websocket import stream_protocol


def uvicorn_config(
    application: FastAPI, app: AppState, host: str, port: int, limits: ConnectionLimits, tls: Tls | None = None
) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        host=host,
        port=port,
        http=http_protocol(app, limits, tls),
        ws=stream_protocol(app.turns, app.held),
        ws_max_size=app.limits.max_body_bytes,
        ws_per_message_deflate=False,
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_keep_alive=limits.keep_alive,  # type: ignore[arg-type]  # any number will do
    )


def operator_config(
    main: uvicorn.Config, application: FastAPI, app: AppState, limits: ConnectionLimits
) -> uvicorn.Config:
    """Of the operator's port, which is otherwise as the main one. `main` must not be loaded yet."""
    config = copy.copy(main)
    config.app, config.http = application, operator_protocol(app, limits)
    return config
