"""The Open Inference Protocol's infer call: from a request to an Answer, without a framework.

A sequence of the protocol is a session: its `sequence_id` is a session id here, an integer as its decimal digits.
"""

from functools import partial

import numpy as np
import structlog

from unroll.bundle import TensorSpec
from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import open_inference_error
from unroll.service.api.parameters import require_streamable
from unroll.service.api.request import JSON, RAW, Answer, Answering, Cancel, Request, Respond, nothing_to_cancel
from unroll.service.core.errors import InvalidRequest, InvalidShape
from unroll.service.engine.engine import Tensors
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol import open_inference
from unroll.service.protocol.open_inference import InferHeader, InferRequest, SequenceParameters
from unroll.service.scheduler.chunk import Chunk, Opening
from unroll.service.scheduler.reply import Reply
from unroll.service.scheduler.session import Session
from unroll.service.sessions.directory import check_id

HEADER_LENGTH = b"inference-header-content-length"

_log = structlog.get_logger(__name__)


class _Plan:
    """What the header of a request means for one version of a model: worked out once, used at every step.

    wanted: the outputs to return, and which of them as binary.
    """

    def __init__(self, served: ServedModel, name: str, header: InferHeader) -> None:
        self.manifest = served.manifest
        self.wanted = _wanted(served, header)
        self._head: dict = {"model_name": name, "model_version": served.version}
        if header.id is not None:
            self._head["id"] = header.id
        self._binary = all(binary for _, binary in self.wanted)
        self._shapes: tuple[tuple[int, ...], ...] = ()
        self._text = b"", b""  # of an answer with these shapes, before and after the position

    def answer(self, outputs: Tensors, position: int | None = None) -> Answer:
        """outputs: all of the model's, each (batch, time, *shape), or (batch, *shape) without time."""
        arrays = dict(zip((spec.name for spec in self.manifest.outputs), outputs, strict=True))
        if position is None:
            return _encoded(self._head, [(spec, arrays[spec.name], binary) for spec, binary in self.wanted])
        if not self._binary:
            head = {**self._head, "parameters": {"sequence_position": position}}
            return _encoded(head, [(spec, arrays[spec.name], binary) for spec, binary in self.wanted])
        returned = [arrays[spec.name] for spec, _ in self.wanted]
        shapes = tuple([array.shape for array in returned])
        if shapes != self._shapes:
            self._shapes, self._text = shapes, self._written(returned)
        text = b"%b%d%b" % (self._text[0], position, self._text[1])
        fields = b"inference-header-content-length: %d\r\n" % len(text)
        return Answer(200, RAW, b"".join([text, *[array.tobytes() for array in returned]]), fields)

    def _written(self, returned: list[np.ndarray]) -> tuple[bytes, bytes]:
        """The JSON of an answer, cut where the position belongs: it is the last member, and 0."""
        entries = [(spec, array, True) for (spec, _), array in zip(self.wanted, returned, strict=True)]
        body, length = open_inference.encode({**self._head}, entries)
        return body[: (length or 1) - 1] + b',"parameters":{"sequence_position":', b"}}"


def _plan(served: ServedModel, name: str, asked: InferRequest) -> _Plan:
    plan: _Plan | None = asked.header.plan
    if plan is None or plan.manifest is not served.manifest:
        plan = asked.header.plan = _Plan(served, name, asked.header)
    return plan


def infer(app: AppState, name: str, version: str | None, request: Request, respond: Respond) -> Cancel:
    """Whole sequences, or the next steps of one sequence if the request carries a `sequence_id`."""
    asked = open_inference.parse(request.body, request.whole_number(HEADER_LENGTH), app.limits.max_json_bytes)
    if asked.header.sequence is not None:
        return _sequence_steps(app, name, version, asked, asked.header.sequence, request, respond)
    served = app.models.resolve(name, version)
    _refuse_static(served)
    settled = Answering(respond, open_inference_error, _answer_sequences, _plan(served, name, asked))
    return served.loop.submit_sequences(_batch(served, asked), _timeout(app, asked), settled)


def _timeout(app: AppState, asked: InferRequest) -> float:
    return asked.header.timeout or app.limits.request_timeout


def _refuse_static(served: ServedModel) -> None:
    if served.manifest.static:
        names = [spec.name for spec in served.manifest.static]
        raise InvalidShape(
            f"model {served.name!r} has static inputs {names}: open the session with the native API, which takes them"
        )


def _answer_sequences(plan: _Plan, replies: list[Reply]) -> Answer:
    return plan.answer(tuple(np.stack(arrays) for arrays in zip(*(reply.outputs for reply in replies), strict=True)))


def _sequence_steps(
    app: AppState,
    name: str,
    version: str | None,
    asked: InferRequest,
    sequence: SequenceParameters,
    request: Request,
    respond: Respond,
) -> Cancel:
    timeout, again = _timeout(app, asked), request.again_with(sequence.id)
    served, session = _find(app, name, version, sequence, asked)
    require_streamable(served)
    if sequence.start:
        app.refuse_if_draining()
        _refuse_static(served)
    settled = Answering(respond, open_inference_error, _answer_steps, _plan(served, name, asked), again)
    batch = _batch(served, asked)
    if len(batch) != 1:
        raise InvalidShape("a request for a sequence must have batch size 1")
    chunk = Chunk(batch[0], session, sequence.position, final=sequence.end)
    if session is None:
        now = served.loop.clock.now()
        if (reply := served.scheduler.replay_closing(sequence.id, chunk, now)) is not None:
            settled(reply)
            return nothing_to_cancel
        if not sequence.start:
            raise served.scheduler.sessions.closed.error(sequence.id, now)
        chunk.opening = _opening(app, name, served, sequence, timeout)
    accepted = served.loop.submit(chunk, timeout, settled)
    return nothing_to_cancel if accepted is None else partial(served.loop.leave, accepted, settled)


def _answer_steps(plan: _Plan, reply: Reply) -> Answer:
    return plan.answer(tuple([array[np.newaxis] for array in reply.outputs]), reply.position)


def _encoded(head: dict, outputs: list[tuple[TensorSpec, np.ndarray, bool]]) -> Answer:
    body, header_length = open_inference.encode(head, outputs)
    if header_length is None:
        return Answer(200, JSON, body)
    return Answer(200, RAW, body, b"inference-header-content-length: %d\r\n" % header_length)


def _find(
    app: AppState,
    name: str,
    version: str | None,
    sequence: SequenceParameters,
    asked: InferRequest,
) -> tuple[ServedModel, Session | None]:
    """The version of a sequence, and its session; None if there is none, or if the request restarts it.

    An open sequence, or one that a retry opens or closes again, stays with its version; a new one gets the newest.
    """
    check_id(sequence.id)
    if not sequence.start:
        return app.sessions.owner(name, version, sequence.id)
    app.sessions.require_verified(name, sequence.id)
    if sequence.position not in (None, 0):
        raise InvalidRequest("sequence_position must be 0 in a request that starts a sequence")
    if sequence.position == 0:
        owner, session = app.sessions.owner(name, version, sequence.id)
        if session is not None or _remembers(owner, sequence.id, asked):
            return owner, session
    return app.models.resolve(name, version), None


def _remembers(owner: ServedModel, session_id: str, asked: InferRequest) -> bool:
    now = owner.loop.clock.now()
    try:
        return any(
            owner.scheduler.sessions.closed.knows_request(session_id, inputs, now) for inputs in _batch(owner, asked)
        )
    except InvalidRequest:  # an older version's inputs may have been others
        return False


def _opening(app: AppState, name: str, served: ServedModel, sequence: SequenceParameters, timeout: float) -> Opening:
    """The session that a request with START opens.

    Without a position, START on an open sequence closes the old one, as in Triton; with position 0 it is a retry. A
    durable session takes the place of the old one in the store.
    """
    durability, token = app.durability, b""
    if sequence.position is None and (found := app.sessions.directory.living(name, sequence.id)) is not None:
        old, session = found
        now = old.loop.clock.now()
        served.scheduler.check_room(now, now + timeout, row=True)  # a request that is refused must not end anything
        old.scheduler.restart(session, now)
        _log.warning("sequence restarted", model=name, sequence_id=sequence.id, position=session.position)
        if session.durable is not None and session.origin is not None:
            durability, token = session.origin.durability, session.durable.token
    return Opening(sequence.id, None if durability == "memory" else served.origin(durability), token)


def _batch(served: ServedModel, asked: InferRequest) -> list[Tensors]:
    """The request's rows, each input (time, *shape)."""
    specs = served.manifest.inputs
    arrays = open_inference.read_inputs(asked, specs)
    served.codec.check_sequences(len(arrays[0]))
    checked = served.codec.checked
    return [
        tuple([checked(spec, array[i]) for spec, array in zip(specs, arrays, strict=True)])
        for i in range(len(arrays[0]))
    ]


def _wanted(served: ServedModel, header: InferHeader) -> list[tuple[TensorSpec, bool]]:
    """Raises InvalidRequest for an output that the model does not have."""
    available = {spec.name: spec for spec in served.manifest.outputs}
    wanted = header.outputs or tuple((name, header.binary_output) for name in available)
    if unknown := {name for name, _ in wanted} - available.keys():
        raise InvalidRequest(f"outputs {sorted(unknown)} are not among {sorted(available)}")
    return [(available[name], binary) for name, binary in wanted]
