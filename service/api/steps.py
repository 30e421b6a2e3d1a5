"""Steps and sequences of the native API: from a request to an Answer, without a framework."""

from service.api.http import JSON, RAW, Answer, Request
from service.api.server import Server
from service.catalog.model import ServedModel
from service.core.errors import InvalidRequest, NotStreamable, UnsupportedMediaType
from service.protocol import json

POSITION = b"unroll-position"
TIMEOUT = b"unroll-timeout-ms"


async def steps(server: Server, model: str, session_id: str, request: Request) -> Answer:
    """T >= 1 time steps of a session; the reply's outputs are one per time step."""
    served = server.catalog.owner(*split_reference(model), session_id)
    require_streamable(served)
    timeout = _timeout(server, request)
    position = request.whole_number(POSITION)
    if request.media_type == RAW:
        inputs = served.codec.from_raw(request.body)
        reply = await served.loop.steps(session_id, inputs, timeout, position=position)
        return Answer(
            200, RAW, served.codec.to_raw(reply.outputs), ((b"unroll-position", str(reply.position).encode()),)
        )
    document = _json_body(server, request, {"inputs", "position"})
    if (said := document.get("position")) is not None:
        if isinstance(said, bool) or not isinstance(said, int) or said < 0:
            raise InvalidRequest("'position' must be a whole number, 0 or more")
        if position not in (None, said):
            raise InvalidRequest(f"the header says position {position}, the body {said}")
        position = said
    inputs = served.codec.from_json(document["inputs"])
    reply = await served.loop.steps(session_id, inputs, timeout, position=position)
    body = json.dump({"outputs": served.codec.to_json(reply.outputs), "position": reply.position})
    return Answer(200, JSON, body, ((b"unroll-position", str(reply.position).encode()),))


async def sequences(server: Server, model: str, request: Request) -> Answer:
    """Whole sequences, each from the model's initial state; nothing is kept."""
    served = server.catalog.resolve(*split_reference(model))
    timeout = _timeout(server, request)
    if request.media_type == RAW:
        (reply,) = await served.loop.sequences([served.codec.from_raw(request.body)], timeout)
        return Answer(200, RAW, served.codec.to_raw(reply.outputs))
    document = _json_body(server, request, {"inputs"})
    replies = await served.loop.sequences(served.codec.sequences_from_json(document["inputs"]), timeout)
    return Answer(200, JSON, json.dump({"outputs": served.codec.sequences_to_json([r.outputs for r in replies])}))


def split_reference(model: str) -> tuple[str, str | None]:
    """`name` or `name:version`."""
    name, _, version = model.partition(":")
    return name, version or None


def require_streamable(model: ServedModel) -> None:
    if not model.manifest.streamable:
        raise NotStreamable(
            f"model {model.name!r} serves whole sequences only: {model.manifest.not_streamable_because}"
        )


def _timeout(server: Server, request: Request) -> float:
    milliseconds = request.whole_number(TIMEOUT)
    return server.limits.request_timeout if milliseconds is None else milliseconds / 1000


def _json_body(server: Server, request: Request, members: set[str]) -> dict:
    if request.media_type != JSON:
        raise UnsupportedMediaType("send application/json, or application/octet-stream for raw little-endian values")
    document = json.parse_object(request.body, server.limits.max_json_bytes)
    if "inputs" not in document or document.keys() - members:
        raise InvalidRequest(f"the body has {sorted(document)}; it may have {sorted(members)} and needs 'inputs'")
    return document
