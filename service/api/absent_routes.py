"""Triton extensions that are not implemented answer 501, because a 404 would suggest that the model is missing."""

from collections.abc import Awaitable, Callable, Collection

from fastapi import APIRouter
from starlette.exceptions import HTTPException

_SHARED = "shared memory is not supported, because clients run on other machines; send tensors in the body"
_LOADING = (
    "loading by request is disabled; add the bundle to the repository or remove it, and send the server SIGHUP; "
    "see --admin and --admin-port"
)
_GENERATE = "generate is not supported; use infer with a sequence_id, or a stream: /v1/models/{model}/stream"
_TRACE = "traces are not supported; /metrics and /v2/models/{model}/stats have times by stage"
_LOGGING = "log settings are not supported here; start the server with --log-level and --log-requests"
#: Loading and unloading, which are available to operators; see `operator_routes.py`.
LOADING = ("/repository/models/{model}/load", "/repository/models/{model}/unload")
#: Reasons by path below /v2.
_ABSENT = {
    "/systemsharedmemory/{rest:path}": _SHARED,
    "/cudasharedmemory/{rest:path}": _SHARED,
    **dict.fromkeys(LOADING, _LOADING),
    **{
        f"/models/{{model}}{version}/{name}": why
        for version in ("", "/versions/{version}")
        for name, why in (("generate", _GENERATE), ("generate_stream", _GENERATE), ("trace/setting", _TRACE))
    },
    "/trace/setting": _TRACE,
    "/logging": _LOGGING,
}


def router(offered: Collection[str]) -> APIRouter:
    """offered: paths below /v2 that are implemented."""
    api = APIRouter(prefix="/v2", include_in_schema=False)
    for path, why in _ABSENT.items():
        if path in offered:
            continue
        api.add_api_route(path, _refusal(why), methods=["GET", "POST"])
    return api


def _refusal(why: str) -> Callable[[], Awaitable[None]]:
    async def refuse() -> None:
        raise HTTPException(501, why)

    return refuse
