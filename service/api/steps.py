"""Steps and sequences of the native API: from a request to an Answer, without a framework."""

from functools import partial

from service.api.errors import problem
from service.api.http import JSON, RAW, Answer, Answering, Cancel, Request, Respond, nothing_to_cancel
from service.api.server import Server
from service.catalog.model import ServedModel
from service.core.errors import InvalidRequest, NotStreamable, UnsupportedMediaType
from service.protocol import json
from service.protocol.tensors import Codec
from service.scheduler.work import Reply

POSITION = b"unroll-position"
TIMEOUT = b"unroll-timeout-ms"


def steps(server: Server, model: str, session_id: str, request: Request, respond: Respond) -> Cancel:
    """T >= 1 time steps of a session; the reply's outputs are one per time step."""
    served = server.catalog.owner(*split_reference(model), session_id)
    require_streamable(served)
    timeout = _timeout(server, request)
    position = request.whole_number(POSITION)
    if request.media_type == RAW:
        inputs, encode = served.codec.from_raw(request.body), _raw_steps
    else:
        document = _json_body(server, request, {"inputs", "position"})
        position = _position(document, position)
        inputs, encode = served.codec.from_json(document["inputs"]), _json_steps
    settled = Answering(respond, problem, encode, served.codec)
    chunk = served.loop.submit_steps(session_id, inputs, timeout, settled, position=position)
    return nothing_to_cancel if chunk is None else partial(served.loop.leave, chunk, settled)


def _raw_steps(codec: Codec, reply: Reply) -> Answer:
    return Answer(200, RAW, codec.to_raw(reply.outputs), b"unroll-position: %d\r\n" % reply.position)


def _json_steps(codec: Codec, reply: Reply) -> Answer:
    body = json.dump({"outputs": codec.to_json(reply.outputs), "position": reply.position})
    return Answer(200, JSON, body, b"unroll-position: %d\r\n" % reply.position)


def sequences(server: Server, model: str, request: Request, respond: Respond) -> Cancel:
    """Whole sequences, each from the model's initial state; nothing is kept."""
    served = server.catalog.resolve(*split_reference(model))
    timeout = _timeout(server, request)
    if request.media_type == RAW:
        batch, encode = [served.codec.from_raw(request.body)], _raw_sequence
    else:
        inputs = _json_body(server, request, {"inputs"})["inputs"]
        batch, encode = served.codec.sequences_from_json(inputs), _json_sequences
    return served.loop.submit_sequences(batch, timeout, Answering(respond, problem, encode, served.codec))


def _raw_sequence(codec: Codec, replies: list[Reply]) -> Answer:
    return Answer(200, RAW, codec.to_raw(replies[0].outputs))


def _json_sequences(codec: Codec, replies: list[Reply]) -> Answer:
    return Answer(200, JSON, json.dump({"outputs": codec.sequences_to_json([reply.outputs for reply in replies])}))


def _position(document: dict, header: int | None) -> int | None:
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
