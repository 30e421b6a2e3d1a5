"""How uvicorn runs the application: with our protocols, and without what a step does not need."""

import uvicorn
from fastapi import FastAPI

from unroll.service.api.app_state import AppState
from unroll.service.transport.http import http_protocol
from unroll.service.transport.websocket import stream_protocol

#: Longer than a sensor's pause between two readings, and than the idle time of most load balancers.
_KEEP_ALIVE_SECONDS = 75


def uvicorn_config(application: FastAPI, app: AppState, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        host=host,
        port=port,
        http=http_protocol(app),
        ws=stream_protocol(app.turns),
        ws_max_size=app.limits.max_body_bytes,
        ws_per_message_deflate=False,
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )
