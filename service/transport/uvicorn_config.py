"""The uvicorn configuration: our protocols, and nothing that a step does not need."""

import copy
from dataclasses import replace

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from unroll.service.access.certificate import Tls
from unroll.service.api.app_state import AppState
from unroll.service.transport.connections import ConnectionLimits, Connections
from unroll.service.transport.http import CrossOriginProtocol, HttpProtocol, OperatorProtocol
from unroll.service.transport.tls import Handshake
from unroll.service.transport.websocket import stream_protocol

#: Maximum number of connections to the operator's port.
_OPERATORS = 32


def uvicorn_config(
    application: FastAPI, app: AppState, host: str, port: int, limits: ConnectionLimits, tls: Tls | None = None
) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        host=host,
        port=port,
        http=_http_protocol(app, limits, tls),
        ws=stream_protocol(app.turns, app.held),
        ws_max_size=app.limits.max_body_bytes,
        ws_per_message_deflate=False,
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_keep_alive=limits.keep_alive,  # type: ignore[arg-type]  # a float works
    )


def operator_config(
    main: uvicorn.Config, application: FastAPI, app: AppState, limits: ConnectionLimits
) -> uvicorn.Config:
    """The configuration of the operator's port, derived from `main`, which must not be loaded yet."""
    config = copy.copy(main)
    config.app, config.http = application, _operator_protocol(app, limits)
    return config


def _http_protocol(
    app: AppState, limits: ConnectionLimits, tls: Tls | None = None
) -> type[HttpToolsProtocol | Handshake]:
    members = {"unroll": app, "limits": limits, "all_connections": Connections(limits, app.connections)}
    protocol = type("HttpProtocol", (CrossOriginProtocol if app.gate.origins else HttpProtocol,), members)
    return protocol if tls is None else type("TlsProtocol", (Handshake,), {"protocol": protocol, "tls": tls})


def _operator_protocol(app: AppState, limits: ConnectionLimits) -> type[HttpToolsProtocol]:
    """The protocol class for the operator's port, without inference routes and with few connections."""
    limits = replace(limits, connections=_OPERATORS, per_address=None)
    members = {"unroll": app, "limits": limits, "all_connections": Connections(limits)}
    return type("OperatorProtocol", (OperatorProtocol,), members)
