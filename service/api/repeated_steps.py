"""Raw single steps that come again and again on one connection: what was looked up for one is kept for the next."""

from collections.abc import Sequence

from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import problem
from unroll.service.api.parameters import POSITION
from unroll.service.api.request import RAW, Answer, Cancel, Request, Respond
from unroll.service.core.errors import SessionContended
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol.tensors import Codec
from unroll.service.scheduler.chunk import GroupReply
from unroll.service.scheduler.session import Session


class RepeatedStep:
    """A step with headers that are known: only the position and the values are new.

    request, respond: of the first such step of a connection, which has one of each.
    """

    __slots__ = ("_again", "_app", "_form", "_respond", "_served", "_session", "_tenant")

    def __init__(
        self, app: AppState, served: ServedModel, session: Session, request: Request, respond: Respond
    ) -> None:
        self._app = app
        self._served = served
        self._session = session
        self._tenant = request.tenant
        self._form = _RawSteps(served.codec)
        self._again, self._respond = request.again, respond

    def __call__(self, request: Request, respond: Respond) -> Cancel | None:
        """Begin it together with others; None if it must be begun as any request."""
        tenant = request.tenant
        if tenant != self._tenant or (tenant and self._app.meter.limits(tenant)):
            return None
        position = request.position = request.whole_number(POSITION)
        timeout = self._app.limits.request_timeout
        if self._session.durable is not None:
            request.again, respond = self._again, self._finish
        return self._served.loop.join(self._session, position, request.body, timeout, self._form, respond)

    def _finish(self, answer: Answer) -> None:
        """Answer a durable session's step, or begin it again, because another replica updated the session."""
        if not (isinstance(answer.error, SessionContended) and self._again and self._again(self._session.id)):
            self._respond(answer)


class _RawSteps:
    """Steps as raw bytes, and their answers."""

    __slots__ = ("_codec", "faults")

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.faults = codec.faults

    def answer(self, listeners: Sequence[Respond], reply: GroupReply) -> None:
        values, positions, errors = self._codec.rows_to_raw(reply.outputs), reply.positions.tolist(), reply.errors
        for row, respond in enumerate(listeners):
            if row in errors:
                respond(problem(errors[row]))
            else:
                respond(Answer(200, RAW, values[row], b"unroll-position: %d\r\n" % positions[row]))
