"""Raw single steps that come again and again on one connection: what was looked up for one is kept for the next."""

from collections.abc import Sequence

from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import problem
from unroll.service.api.parameters import POSITION
from unroll.service.api.request import RAW, Answer, Cancel, Request, Respond
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol.tensors import Codec
from unroll.service.scheduler.chunk import GroupReply
from unroll.service.scheduler.session import Session


class RepeatedStep:
    """A step of a memory session, with headers that are known: only the position and the values are new."""

    __slots__ = ("_app", "_form", "_served", "_session", "_tenant")

    def __init__(self, app: AppState, served: ServedModel, session: Session, tenant: str) -> None:
        self._app = app
        self._served = served
        self._session = session
        self._tenant = tenant
        self._form = _RawSteps(served.codec)

    def __call__(self, request: Request, respond: Respond) -> Cancel | None:
        """Begin it together with others; None if it must be begun as any request."""
        tenant = request.tenant
        if tenant != self._tenant or (tenant and self._app.meter.limits(tenant)):
            return None
        position = request.position = request.whole_number(POSITION)
        timeout = self._app.limits.request_timeout
        return self._served.loop.join(self._session, position, request.body, timeout, self._form, respond)


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
