"""What a request of the native API says besides its values: model, position, time-out, the members of its JSON."""

from unroll.service.api.app_state import AppState
from unroll.service.api.request import JSON, Request
from unroll.service.core.errors import InvalidRequest, NotStreamable, UnsupportedMediaType
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol import json

POSITION = b"unroll-position"
TIMEOUT = b"unroll-timeout-ms"


def position_of(document: dict, header: int | None) -> int | None:
    """Where the client believes the session is: what the body says, or the header. Raises InvalidRequest."""
    said = document.get("position")
    if said is None:
        return header
    if isinstance(said, bool) or not isinstance(said, int) or said < 0:
        raise InvalidRequest("'position' must be a whole number, 0 or more")
    if header not in (None, said):
        raise InvalidRequest(f"the header says position {header}, the body {said}")
    return said


def split_reference(model: str) -> tuple[str, str | None]:
    """`name` or `name:version`."""
    name, _, version = model.partition(":")
    return name, version or None


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
        raise UnsupportedMediaType("send application/json, or application/octet-stream for raw little-endian values")
    document = json.parse_object(request.body, app.limits.max_json_bytes)
    if "inputs" not in document or document.keys() - members:
        raise InvalidRequest(f"the body has {sorted(document)}; it may have {sorted(members)} and needs 'inputs'")
    return document
