"""Single steps that come again and again on one connection: what was looked up for one is kept for the next."""

from collections.abc import Callable, Sequence
from typing import Any

from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import problem
from unroll.service.api.parameters import POSITION, position_of
from unroll.service.api.request import JSON, RAW, Answer, Cancel, Request, Respond
from unroll.service.core.errors import SessionContended, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol import json
from unroll.service.scheduler.session import Session


class RepeatedStep:
    """A step in raw bytes, with headers that are known: only the numbers in them may be new.

    Args:
        request: The first such step of a connection, which has one.
        respond: Takes the answers to all of them.
        timeout: Seconds until each must have begun.

    Attributes:
        failure: The form of an error.
        write: Writes what the answers to a group's rows have of the outputs.
    """

    __slots__ = ("_again", "_app", "_respond", "_served", "_session", "_tenant", "_timeout", "write")

    failure = staticmethod(problem)
    write: Callable[[Tensors], Sequence[Any]]

    def __init__(
        self,
        app: AppState,
        served: ServedModel,
        session: Session,
        request: Request,
        respond: Respond,
        timeout: float,
    ) -> None:
        self._app = app
        self._served = served
        self._session = session
        self._tenant = request.tenant
        self._timeout = timeout
        self._again, self._respond = request.again, respond
        self.write = served.codec.rows_to_raw

    def __call__(self, request: Request, respond: Respond) -> Cancel | None:
        """Begin it together with others; None if it must be begun as any request."""
        tenant = request.tenant
        if tenant != self._tenant or (tenant and self._app.meter.limits(tenant)):
            return None
        step = self.read(request)
        if step is None:
            return None
        if not self._served.loop.join(self._session, request.position, step, self._timeout, self):
            return None
        if self._session.durable is not None:
            request.again = self._again
        return self._leave

    def read(self, request: Request) -> bytes | None:
        """The inputs one after another; None if this is no such step. Sets the position of the request."""
        position = request.headers.get(POSITION)
        if position is not None:
            request.position = int(position)
        return request.body

    def complete(self, written: Any, position: int) -> None:
        self._respond(Answer(200, RAW, written, b"unroll-position: %d\r\n" % position))

    def fail(self, error: UnrollError) -> None:
        """Answer with the error; or begin it again, because another replica updated the session."""
        if not (isinstance(error, SessionContended) and self._again and self._again(self._session.id)):
            self._respond(self.failure(error))

    def _leave(self) -> None:
        self._served.loop.leave_joined(self._session, self)


class RepeatedJsonStep(RepeatedStep):
    """The same in JSON."""

    __slots__ = ()

    def __init__(self, app: AppState, served: ServedModel, *args: Any) -> None:
        super().__init__(app, served, *args)
        self.write = served.codec.rows_to_json

    def read(self, request: Request) -> bytes | None:
        try:
            document = json.parse_object(request.body, self._app.limits.max_json_bytes)
            if "inputs" not in document or document.keys() - {"inputs", "position"}:
                return None
            request.position = position_of(document, request.whole_number(POSITION))
            return self._served.codec.step_from_json(document["inputs"])
        except UnrollError:
            return None

    def complete(self, written: bytes, position: int) -> None:
        body = b'{"outputs":%b,"position":%d}' % (written, position)
        self._respond(Answer(200, JSON, body, b"unroll-position: %d\r\n" % position))
