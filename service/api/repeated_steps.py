"""Single steps over HTTP: they run in groups, and a repeated one reuses the lookups of the previous one."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import problem
from unroll.service.api.parameters import POSITION, position_of
from unroll.service.api.request import JSON, RAW, Answer, Answering, Cancel, Request, Respond, nothing_to_cancel
from unroll.service.core.errors import SessionContended, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol import json
from unroll.service.scheduler.chunk import Chunk, Opening
from unroll.service.scheduler.loop import Loop
from unroll.service.scheduler.session import OPEN, Session
from unroll.service.sessions.attempts import ATTEMPTS


def submit_chunk(loop: Loop, chunk: Chunk, timeout: float, settled: Answering[Any, Any]) -> Cancel:
    accepted = loop.submit(chunk, timeout, settled)
    return nothing_to_cancel if accepted is None else partial(loop.leave, accepted, settled)


class RepeatedStep:
    """A step in raw bytes, and later ones of the connection with the same headers, except for numbers.

    Args:
        request: The first step.
        respond: Called with the answer to each step.
        timeout: Seconds within which each step must start.

    Attributes:
        failure: Converts an error to an answer.
        write: Encodes a group's outputs, one element per row.
    """

    __slots__ = (
        *(
            "_again",
            "_app",
            "_ends",
            "_left",
            "_opening",
            "_position",
            "_respond",
            "_served",
            "_session",
            "_step",
            "_tenant",
        ),
        *("_timeout", "_unwanted", "write"),
    )

    failure = staticmethod(problem)
    patient = False
    write: Callable[[Tensors], Sequence[Any]]
    _session: Session  # known from `submit` on

    def __init__(
        self,
        app: AppState,
        served: ServedModel,
        request: Request,
        respond: Respond,
        timeout: float,
    ) -> None:
        self._app = app
        self._served = served
        self._tenant = request.tenant
        self._timeout = timeout
        self._left = 1
        self._ends = False
        self._opening: Opening | None = None
        self._unwanted = False
        self._again, self._respond = request.again, respond
        self.write = served.codec.rows_to_raw

    def submit(self, chunk: Chunk, settled: Answering[Any, Any]) -> Cancel:
        """Join the first step to those that wait, or submit it as a chunk, which `settled` answers."""
        joins = self._served.loop.join_chunk(chunk, self._timeout, self)
        assert chunk.session is not None
        self._session = chunk.session
        return self._leave if joins else submit_chunk(self._served.loop, chunk, self._timeout, settled)

    def __call__(self, request: Request, respond: Respond) -> Cancel | None:
        """Join the step to those that wait, perhaps after a lookup; None if it must be handled as any request."""
        tenant = request.tenant
        if tenant != self._tenant or (tenant and self._app.meter.limits(tenant)):
            return None
        step = self.read(request)
        if step is None:
            return None
        if self._session.durable is not None:
            request.again = self._again
            self._step, self._position, self._left = step, request.position, ATTEMPTS
        place = self._session, request.position, step, self._timeout, self
        if not self._served.loop.join(*place, opening=self._opening, ends=self._ends):
            if not self._is_behind(request.position):
                return None
            self._app.sessions.verify(self._served.name, self._session.id, self._looked_up)
        return self._leave

    def _is_behind(self, position: int | None) -> bool:
        """Whether the step can probably join after a lookup, because another replica has updated the session."""
        durable, progress = self._session.durable, self._session.progress
        if durable is None or progress is None or progress.active is not None or self._session.life is not OPEN:
            return False
        return durable.stale or (position is not None and position > progress.position)

    def _looked_up(self, error: UnrollError | None) -> None:
        if self._unwanted:
            return
        if error is not None:
            self._respond(self.failure(error))
        elif not self._join() and self._again is not None:
            self._again()

    def _join(self) -> bool:
        return self._served.loop.join(self._session, self._position, self._step, self._timeout, self)

    def read(self, request: Request) -> bytes | None:
        """The step's inputs, concatenated; None if this is not such a step. Sets the position of the request."""
        position = request.headers.get(POSITION)
        if position is not None:
            request.position = int(position)
        return request.body

    def complete(self, written: Any, position: int) -> None:
        self._respond(Answer(200, RAW, written, b"unroll-position: %d\r\n" % position))

    def fail(self, error: UnrollError) -> None:
        """Answer with the error, or handle the step again if another replica updated the session."""
        if isinstance(error, SessionContended) and self._again is not None and not self._unwanted:
            self._left -= 1
            if (self._left > 0 and self._join()) or self._again():
                return
        self._respond(self.failure(error))

    def _leave(self) -> None:
        self._unwanted = True
        self._served.loop.leave_joined(self._session, self)


class RepeatedJsonStep(RepeatedStep):
    """A repeated step in JSON."""

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
