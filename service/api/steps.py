"""Steps and sequences of the native API, from request to answer, independent of the web framework."""

from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import problem
from unroll.service.api.parameters import (
    POSITION,
    STEPS,
    json_body,
    position_of,
    require_streamable,
    split_reference,
    timeout_of,
)
from unroll.service.api.repeated_steps import RepeatedJsonStep, RepeatedStep, submit_chunk
from unroll.service.api.request import (
    NOT_KEPT,
    RAW,
    Answer,
    Answering,
    Cancel,
    Request,
    Respond,
    has_fixed_length,
    json_answer,
    raw_answer,
)
from unroll.service.api.sealed_steps import LENGTH, sealed_steps
from unroll.service.protocol.tensors import Codec
from unroll.service.scheduler.chunk import Chunk
from unroll.service.scheduler.reply import Reply


def steps(app: AppState, model: str, session_id: str, request: Request, respond: Respond) -> Cancel:
    """Run T >= 1 time steps of a session; the reply has one output per time step."""
    session_id = request.own(session_id)
    if LENGTH in request.headers:
        return sealed_steps(app, model, session_id, request, respond)
    timeout = timeout_of(app, request)
    position = request.position = request.whole_number(POSITION)
    document = None if request.media_type == RAW else json_body(app, request, {"inputs", "position", "snapshot"})
    if document is not None and "snapshot" in document:
        return sealed_steps(app, model, session_id, request, respond, document)
    served, session = app.sessions.owner(*split_reference(model), session_id)
    require_streamable(served)
    if document is None:
        inputs, encode = served.codec.from_raw(request.body, request.whole_number(STEPS)), _raw_steps
    else:
        position = request.position = position_of(document, position)
        inputs, encode = served.codec.from_json(document["inputs"]), _json_steps
    settled = Answering(respond, problem, encode, served.codec, request.again)
    if session is None:
        raise served.ended(session_id)
    app.meter.take(request.tenant, len(inputs[0]))
    chunk = Chunk(inputs, session, position)
    if chunk.length > 1:
        return submit_chunk(served.loop, chunk, timeout, settled)
    step = (RepeatedStep if document is None else RepeatedJsonStep)(app, served, request, respond, timeout)
    cancel = step.submit(chunk, settled)
    if request.text is not None and (document is not None or has_fixed_length(request.headers)):
        request.repeat = step
    return cancel


def _raw_steps(codec: Codec, reply: Reply) -> Answer:
    return raw_answer(codec, reply.outputs, _fields(reply))


def _json_steps(codec: Codec, reply: Reply) -> Answer:
    document = {"outputs": codec.to_json(reply.outputs), "position": reply.position}
    return json_answer(document, sum([array.size for array in reply.outputs]), _fields(reply))


def _fields(reply: Reply) -> bytes:
    position = b"unroll-position: %d\r\n" % reply.position
    return position if reply.kept else position + NOT_KEPT


def sequences(app: AppState, model: str, request: Request, respond: Respond) -> Cancel:
    """Run whole sequences, each from the model's initial state; no state is kept."""
    served = app.models.resolve(*split_reference(model))
    codec, timeout = served.codec, timeout_of(app, request)
    if request.media_type == RAW:
        inputs = codec.sequence_from_raw(request.body, request.whole_number(STEPS))
        (row,) = codec.initial_rows(None, 1)
        app.meter.take(request.tenant, len(inputs[0]))
        chunk = Chunk(inputs, state_row=row)
        chunk.tenant = request.tenant
        return submit_chunk(served.loop, chunk, timeout, Answering(respond, problem, _raw_sequence, codec))
    document = json_body(app, request, {"inputs", "static"})
    batch = codec.sequences_from_json(document["inputs"])
    rows = codec.initial_rows(document.get("static"), len(batch))
    app.meter.take(request.tenant, sum(len(inputs[0]) for inputs in batch))
    settled = Answering(respond, problem, _json_sequences, codec)
    return served.loop.submit_sequences(batch, timeout, settled, rows, request.tenant)


def _raw_sequence(codec: Codec, reply: Reply) -> Answer:
    return raw_answer(codec, reply.outputs)


def _json_sequences(codec: Codec, replies: list[Reply]) -> Answer:
    values = sum(array.size for reply in replies for array in reply.outputs)
    return json_answer({"outputs": codec.sequences_to_json([reply.outputs for reply in replies])}, values)
