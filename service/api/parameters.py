"""Parameters of native requests: model, position, timeout, and the members of a JSON body."""

from unroll.service.api.app_state import AppState
from unroll.service.api.request import JSON, Request
from unroll.service.core.errors import InvalidRequest, NotStreamable, UnsupportedMediaType
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol import json

POSITION = b"unroll-position"
STEPS = b"unroll-steps"
TIMEOUT = b"unroll-timeout-ms"


def position_of(document: dict, header: int | None) -> int | None:
    """The position that the client specified in the body or the header. Raises InvalidRequest."""
    position = document.get("position")
    if position is None:
        return header
    if isinstance(position, bool) or not isinstance(position, int) or position < 0:
        raise InvalidRequest("'position' must be a whole number, at least 0")
    if header not in (None, position):
        raise InvalidRequest(f"the position in the header is {header}, and in the body {position}")
    return position


def split_reference(model: str) -> tuple[str, str | None]:
    """Split `name` or `name:version`."""
    name, colon, version = model.partition(":")
    return name, version if colon else None


def require_streamable(model: ServedModel) -> None:
    if not model.manifest.streamable:
        raise NotStreamable(
            f"model {model.name!r} serves whole sequences only: {model.manifest.not_streamable_because}"
        )


def timeout_of(app: AppState, request: Request) -> float:
    milliseconds = request.whole_number(TIMEOUT)
    return app.limits.request_timeout if milliseconds is None else milliseconds / 1000


def json_body(app: AppState, request: Request, members: set[str]) -> dict:
    if request.media_type != JSON:
        raise UnsupportedMediaType(
            "send the body as application/json, or as application/octet-stream with raw little-endian values"
        )
    document = request.document
    if document is None:
        document = json.parse_object(request.body, app.limits.max_json_bytes)
    if "inputs" not in document or document.keys() - members:
        raise InvalidRequest(
            f"the body has the members {sorted(document)}; 'inputs' is required, allowed are {sorted(members)}"
        )
    return document
