"""The infer call of the Open Inference Protocol, from request to answer, independent of the web framework.

A sequence of the protocol is a session. Its `sequence_id` is the session id; integers are written in decimal.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import structlog

from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import open_inference_error
from unroll.service.api.infer_reply import ReplyPlan
from unroll.service.api.parameters import require_streamable
from unroll.service.api.repeated_steps import RepeatedStep, submit_chunk
from unroll.service.api.request import (
    HEADER_LENGTH,
    NOT_KEPT,
    Answer,
    Answering,
    Cancel,
    Request,
    Respond,
    nothing_to_cancel,
)
from unroll.service.core.errors import InvalidRequest, InvalidShape, UnrollError
from unroll.service.core.session_ids import check_id, shown
from unroll.service.engine.engine import Tensors
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol import open_inference
from unroll.service.protocol.open_inference import InferRequest, SequenceParameters
from unroll.service.scheduler.chunk import Chunk, Opening
from unroll.service.scheduler.reply import Reply
from unroll.service.scheduler.session import Session

#: The plan of a reply, and the id of the request.
_Form = tuple[ReplyPlan, str | None]

_log = structlog.get_logger(__name__)


class RepeatedInferStep(RepeatedStep):
    """A step of a sequence; a previous step has found its session, or this one opens another."""

    __slots__ = ("_id", "_name", "_plan", "_request_id", "_version")

    failure = staticmethod(open_inference_error)

    def __init__(
        self,
        name: str,
        version: str | None,
        parsed: InferRequest,
        app: AppState,
        served: ServedModel,
        request: Request,
        *args: Any,
    ) -> None:
        super().__init__(app, served, request, *args)
        self._name, self._version = name, version
        self._id = request.session
        self._plan, self._request_id = _plan(served, name, parsed), parsed.id
        self.write = self._plan.rows

    def read(self, request: Request) -> bytes | None:
        assert request.text is not None  # the first request had it
        try:
            parsed = request.text.parse(
                request.body, request.whole_number(HEADER_LENGTH), self._app.limits.max_json_bytes
            )
            sequence = parsed.sequence
            if sequence is None or (sequence.id != self._id and not sequence.start):
                return None
            if sequence.end and (sequence.position is not None or self._session.durable is not None):
                return None
            step = open_inference.read_step(parsed, self._served.manifest.inputs)
            if step is None:
                batch = _batch(self._served, parsed)
                if len(batch) > 1 or len(batch[0][0]) > 1:
                    return None
                step = self._served.codec.to_raw(batch[0])
            self._plan, self._request_id = _plan(self._served, self._name, parsed), parsed.id
            self._timeout = parsed.header.timeout or self._app.limits.request_timeout
            self._opening = None
            if sequence.start and not self._open(sequence, step, request):
                return None
        except UnrollError:
            return None
        self.write, self._ends = self._plan.rows, sequence.end
        request.session, request.position = sequence.id, sequence.position
        return step

    def _open(self, sequence: SequenceParameters, step: bytes, request: Request) -> bool:
        """Open the session of a request with START; False if it takes more than a free row."""
        app, served, session_id = self._app, self._served, request.own(sequence.id)
        if sequence.position is not None or app.sessions.has_store or app.draining or served.manifest.static:
            return False
        if not app.sessions.directory.is_unused(self._name, session_id):
            return False
        if app.models.resolve(self._name, self._version) is not served:
            return False
        check_id(session_id)
        served.codec.from_raw(step, None)  # an invalid step opens nothing
        app.sessions.refuse_another(request.tenant)
        now = served.loop.clock.now()
        session = served.scheduler.joined.open(session_id, now, now + self._timeout)
        if session is None:
            return False
        self._session, self._id, self._opening = session, sequence.id, Opening(session_id)
        return True

    def complete(self, written: tuple[bytes, ...], position: int) -> None:
        self._respond(self._plan.encode_row(self._request_id, written, position))


def _plan(served: ServedModel, name: str, parsed: InferRequest) -> ReplyPlan:
    """The reply plan, cached in the header, which the parser caches for requests that repeat it."""
    plan: ReplyPlan | None = parsed.header.plan
    if plan is None or plan.manifest is not served.manifest:
        plan = parsed.header.plan = ReplyPlan(served, name, parsed.header)
    return plan


def _form(served: ServedModel, name: str, parsed: InferRequest) -> _Form:
    return _plan(served, name, parsed), parsed.id


def infer(app: AppState, name: str, version: str | None, request: Request, respond: Respond) -> Cancel:
    """Run whole sequences, or the next steps of one sequence if the request has a `sequence_id`."""
    parsed = _parse(app, request)
    if parsed.sequence is not None:
        return _sequence_steps(app, name, version, parsed, parsed.sequence, request, respond)
    served = app.models.resolve(name, version)
    _refuse_static(served)
    settled = Answering(respond, open_inference_error, _answer_sequences, _form(served, name, parsed))
    batch = _batch(served, parsed)
    app.meter.take(request.tenant, sum(len(inputs[0]) for inputs in batch))
    return served.loop.submit_sequences(batch, _timeout(app, parsed), settled, tenant=request.tenant)


def _parse(app: AppState, request: Request) -> InferRequest:
    if request.document is not None:
        return open_inference.read(request.document, memoryview(b""))
    length, limit = request.whole_number(HEADER_LENGTH), app.limits.max_json_bytes
    parse = open_inference.parse if request.text is None else request.text.parse
    return parse(request.body, length, limit)


def _timeout(app: AppState, parsed: InferRequest) -> float:
    return parsed.header.timeout or app.limits.request_timeout


def _refuse_static(served: ServedModel) -> None:
    if served.manifest.static:
        names = [spec.name for spec in served.manifest.static]
        raise InvalidShape(
            f"model {served.name!r} has static inputs {names}: open the session with the native API, which takes them"
        )


def _answer_sequences(form: _Form, replies: list[Reply]) -> Answer:
    plan, request_id = form
    return plan.encode(
        request_id, tuple(np.stack(arrays) for arrays in zip(*(reply.outputs for reply in replies), strict=True))
    )


def _sequence_steps(
    app: AppState,
    name: str,
    version: str | None,
    parsed: InferRequest,
    sequence: SequenceParameters,
    request: Request,
    respond: Respond,
) -> Cancel:
    request.session, request.position = sequence.id, sequence.position
    if (own := request.own(sequence.id)) != sequence.id:
        sequence = replace(sequence, id=own)
    timeout = _timeout(app, parsed)
    served, session = _find(app, name, version, sequence, parsed)
    require_streamable(served)
    if sequence.start:
        app.refuse_if_draining()
        _refuse_static(served)
    settled = Answering(respond, open_inference_error, _answer_steps, _form(served, name, parsed), request.again)
    batch = _batch(served, parsed)
    if len(batch) != 1:
        raise InvalidShape("a request for a sequence must have batch size 1")
    chunk = Chunk(batch[0], session, sequence.position, final=sequence.end)
    if session is None:
        if (reply := served.scheduler.replay_closing(sequence.id, chunk, served.loop.clock.now())) is not None:
            settled(reply)
            return nothing_to_cancel
        if chunk.final and chunk.pinned:
            app.sessions.directory.check_closing_chunk(name, sequence.id, chunk)
        if not sequence.start:
            raise served.ended(sequence.id)
        if request.tenant and app.sessions.directory.living(name, sequence.id) is None:  # a restart adds no session
            app.sessions.refuse_another(request.tenant)
    app.meter.take(request.tenant, len(batch[0][0]))
    if session is None:
        chunk.opening = _opening_after_restart(app, name, served, sequence, timeout)
    if chunk.length > 1:
        return submit_chunk(served.loop, chunk, timeout, settled)
    step = RepeatedInferStep(name, version, parsed, app, served, request, respond, timeout)
    cancel = step.submit(chunk, settled)
    if request.text is not None:
        request.repeat = step
    return cancel


def _answer_steps(form: _Form, reply: Reply) -> Answer:
    plan, request_id = form
    answer = plan.encode(request_id, tuple([array[np.newaxis] for array in reply.outputs]), reply.position)
    if not reply.kept:
        answer.fields += NOT_KEPT
    return answer


def _find(
    app: AppState,
    name: str,
    version: str | None,
    sequence: SequenceParameters,
    parsed: InferRequest,
) -> tuple[ServedModel, Session | None]:
    """The version that serves a sequence, and its session; None if there is none, or if the request restarts it.

    An open sequence keeps its version, and so does a retry of a request that opened or closed one. A new sequence gets
    the current version.
    """
    check_id(sequence.id)
    if not sequence.start:
        return app.sessions.owner(name, version, sequence.id)
    app.sessions.require_verified(name, sequence.id)
    if sequence.position not in (None, 0):
        raise InvalidRequest("sequence_position must be 0 in a request that starts a sequence")
    if sequence.position == 0:
        owner, session = app.sessions.owner(name, version, sequence.id)
        if session is not None or _knows_request(owner, sequence.id, parsed):
            return owner, session
    return app.models.resolve(name, version), None


def _knows_request(owner: ServedModel, session_id: str, parsed: InferRequest) -> bool:
    now = owner.loop.clock.now()
    try:
        return any(
            owner.scheduler.sessions.closed.knows_request(session_id, inputs, now) for inputs in _batch(owner, parsed)
        )
    except InvalidRequest:  # an older version may have other inputs
        return False


def _opening_after_restart(
    app: AppState, name: str, served: ServedModel, sequence: SequenceParameters, timeout: float
) -> Opening:
    """The session that a request with START opens.

    Without a position, START on an open sequence closes the old one, as in Triton; with position 0 it is a retry. A new
    durable session replaces the old one in the store.
    """
    durability, token = app.durability, b""
    if sequence.position is None and (found := app.sessions.directory.living(name, sequence.id)) is not None:
        old, session = found
        now = old.loop.clock.now()
        served.scheduler.check_room(now, now + timeout, sequence.id)  # a refused request must not close the old session
        old.scheduler.restart(session, now)
        _log.warning("sequence restarted", model=name, sequence_id=shown(sequence.id), position=session.position)
        if session.durable is not None and session.origin is not None:
            durability, token = session.origin.durability, session.durable.token
    elif sequence.position is None and (record := app.sessions.directory.find_stranded(name, sequence.id)) is not None:
        if record.token and record.origin.durability == "memory":  # only the replica that spilled it can restore it
            app.models.home(name, record.origin.model, f"sequence {shown(sequence.id)!r} runs on")
        now = served.loop.clock.now()
        served.scheduler.check_room(now, now + timeout, sequence.id)
        app.sessions.directory.spilled.close_stranded(name, sequence.id)
        served.scheduler.counters.restarted += 1
        _log.warning("sequence restarted", model=name, sequence_id=shown(sequence.id), position=record.position)
        if record.token:
            durability, token = record.origin.durability, record.token
    return Opening(sequence.id, None if durability == "memory" else served.origin(durability), token)


def _batch(served: ServedModel, parsed: InferRequest) -> list[Tensors]:
    """The request's rows; each input is (time, *shape)."""
    specs = served.manifest.inputs
    arrays = open_inference.read_inputs(parsed, specs)
    served.codec.check_sequences(len(arrays[0]))
    for spec, array in zip(specs, arrays, strict=True):
        served.codec.checked(spec, array, batch=True)
    return [tuple([array[i] for array in arrays]) for i in range(len(arrays[0]))]
