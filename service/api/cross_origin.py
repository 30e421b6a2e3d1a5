"""Pages of other origins: which may use this server, and how browsers are told."""

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

#: Headers of answers that scripts may read.
_EXPOSED = ("Allow", "Retry-After", "Unroll-Position", "Unroll-Reply-Kept", "Unroll-Snapshot-Length")
#: Seconds for which a browser need not ask again whether it may send a request.
_PREFLIGHT_SECONDS = 600


def allow(application: FastAPI, origins: Sequence[str]) -> None:
    """Answer pages of these origins, and tell their browsers so."""
    application.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("DELETE", "GET", "POST", "PUT"),
        allow_headers=("*",),
        expose_headers=_EXPOSED,
        max_age=_PREFLIGHT_SECONDS,
    )
