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
from unroll.service.protocol.tensors import Codec
from unroll.service.scheduler.chunk import GroupReply
from unroll.service.scheduler.session import OPEN, Session
from unroll.service.sessions.attempts import ATTEMPTS


class RepeatedStep:
    """A step in raw bytes, with headers that are known: only the numbers in them may be new.

    Args:
        request: The first such step of a connection, which has one.
        respond: Takes the answers to all of them.

    Attributes:
        failure: The form of an error.
        write: Writes what the answers to a group's rows have of the outputs.
    """

    __slots__ = (
        *("_again", "_app", "_form", "_left", "_position", "_served", "_session", "_step", "_tenant", "_unwanted"),
        *("respond", "write"),
    )

    failure = staticmethod(problem)
    write: Callable[[Tensors], Sequence[Any]]

    def __init__(
        self, app: AppState, served: ServedModel, session: Session, request: Request, respond: Respond
    ) -> None:
        self._app = app
        self._served = served
        self._session = session
        self._tenant = request.tenant
        self._form = _Joined(served.codec)
        self._unwanted = False
        self._again, self.respond = request.again, respond
        self.write = served.codec.rows_to_raw

    def __call__(self, request: Request, respond: Respond) -> Cancel | None:
        """Begin it together with others, when its session was looked up if that is needed; None if it must be begun as
        any request."""
        tenant = request.tenant
        if tenant != self._tenant or (tenant and self._app.meter.limits(tenant)):
            return None
        step = self.read(request)
        if step is None:
            return None
        if self._session.durable is not None:
            request.again = self._again
            self._step, self._position, self._left = step, request.position, ATTEMPTS
        timeout = self._app.limits.request_timeout
        if not self._served.loop.join(self._session, request.position, step, timeout, self._form, self):
            if not self._is_behind():
                return None
            self._app.sessions.verify(self._served.name, self._session.id, self._looked_up)
        return self._leave

    def _join(self) -> bool:
        timeout = self._app.limits.request_timeout
        return self._served.loop.join(self._session, self._position, self._step, timeout, self._form, self)

    def _leave(self) -> None:
        self._unwanted = True
        self._served.loop.leave_joined(self._session, self)

    def _is_behind(self) -> bool:
        """Would it join if another replica has updated the session?"""
        durable, progress = self._session.durable, self._session.progress
        if durable is None or progress is None or progress.active is not None or self._session.life is not OPEN:
            return False
        return durable.stale or (self._position is not None and self._position > progress.position)

    def _looked_up(self, error: UnrollError | None) -> None:
        if self._unwanted:
            return
        if error is not None:
            self.respond(self.failure(error))
        elif not self._join() and self._again is not None:
            self._again()

    def read(self, request: Request) -> bytes | None:
        """The inputs one after another; None if this is no such step. Sets the position of the request."""
        position = request.headers.get(POSITION)
        if position is not None:
            request.position = int(position)
        return request.body

    def encode(self, written: Any, position: int) -> Answer:
        """The answer. written: what `write` wrote for it."""
        return Answer(200, RAW, written, b"unroll-position: %d\r\n" % position)

    def fail(self, error: UnrollError) -> None:
        """Answer with the error; or begin it again, because another replica updated the session."""
        if isinstance(error, SessionContended) and self._again is not None and not self._unwanted:
            self._left -= 1
            if (self._left and self._join()) or self._again():
                return
        self.respond(self.failure(error))


class RepeatedJsonStep(RepeatedStep):
    """The same in JSON."""

    __slots__ = ()

    def __init__(
        self, app: AppState, served: ServedModel, session: Session, request: Request, respond: Respond
    ) -> None:
        super().__init__(app, served, session, request, respond)
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

    def encode(self, written: bytes, position: int) -> Answer:
        body = b'{"outputs":%b,"position":%d}' % (written, position)
        return Answer(200, JSON, body, b"unroll-position: %d\r\n" % position)


class _Joined:
    """Steps of any kind, and their answers."""

    __slots__ = ("faults",)

    def __init__(self, codec: Codec) -> None:
        self.faults = codec.faults

    def answer(self, listeners: Sequence[RepeatedStep], reply: GroupReply) -> None:
        positions, errors = reply.positions.tolist(), reply.errors
        written: dict[Callable[[Tensors], Sequence[Any]], Sequence[Any]] = {}
        for row, step in enumerate(listeners):
            if row in errors:
                step.fail(errors[row])
                continue
            rows = written.get(step.write)
            if rows is None:
                rows = written[step.write] = step.write(reply.outputs)
            step.respond(step.encode(rows[row], positions[row]))
