"""Drives clients that are wrong on purpose: the first argument says in what. The conversations must find it."""

import asyncio
import sys
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

from unroll.client import Client, errors
from unroll.client.conformance.python_driver import PythonDriver, drive
from unroll.client.exchange import Request, Response
from unroll.client.retries import Retries
from unroll.client.session_calls import SessionCalls
from unroll.client.stream_calls import ControlCall, StepsCall, StreamCalls


def never_retries() -> None:
    Retries.pause = lambda self, retry_after=None: None  # type: ignore[method-assign]


def retries_without_position() -> None:
    attempt = Client._attempt

    def changed(self: Client, request: Request) -> Response:
        request.headers.pop("Unroll-Position", None)
        return attempt(self, request)

    Client._attempt = changed  # type: ignore[method-assign]


def applies_twice() -> None:
    """After a lost answer it asks where the session is, and sends the step at that position."""
    attempt = Client._attempt

    def changed(self: Client, request: Request) -> Response:
        try:
            return attempt(self, request)
        except (OSError, HTTPException):
            if request.path.endswith("/steps"):
                session = attempt(self, Request("GET", request.path.removesuffix("/steps")))
                request.headers["Unroll-Position"] = str(session.json()["position"])
            raise

    Client._attempt = changed  # type: ignore[method-assign]


def ignores_retry_after() -> None:
    pause = Retries.pause
    Retries.pause = lambda self, retry_after=None: pause(self)  # type: ignore[method-assign]


def drops_a_chunk_at_reconnect() -> None:
    """It takes the position of the resumed session for its own, and what was in flight for done."""
    resumed = StreamCalls.resumed

    def changed(self: StreamCalls, call: ControlCall) -> None:
        resumed(self, call)
        for handle, item in call.items.items():
            place = self._places[handle]
            if place.call is not None and "error" not in item:
                place.call._ends[place.call._rows[handle]] = item["position"], ()
                place.call.answer(place.call._rows[handle])

    StreamCalls.resumed = changed  # type: ignore[method-assign]


def takes_any_outputs() -> None:
    """It does not compare the position of outputs with that of the step."""
    receive = StepsCall.receive

    def changed(self: StepsCall, handle: int, end: int, outputs: Any) -> None:
        receive(self, handle, int(self.positions[self._rows[handle]]) + self.steps, outputs)

    StepsCall.receive = changed  # type: ignore[method-assign]


def begins_anew() -> None:
    """Where a session is lost it opens another one, and says nothing."""
    apply = SessionCalls._apply

    def changed(self: SessionCalls, content: bytes, chunk: int | None, position: int | None) -> Any:
        try:
            return (yield from apply(self, content, chunk, position))
        except (errors.SessionUnknown, errors.SessionGone):
            again = yield from self.open(self._catalogue, self.model.name, self.id)
            self.position = again.position
            return (yield from apply(self, content, chunk, 0))

    SessionCalls._apply = changed  # type: ignore[method-assign]


WRONGS: dict[str, Callable[[], None]] = {
    wrong.__name__: wrong
    for wrong in (
        never_retries,
        retries_without_position,
        applies_twice,
        ignores_retry_after,
        drops_a_chunk_at_reconnect,
        takes_any_outputs,
        begins_anew,
    )
}

if __name__ == "__main__":
    WRONGS[sys.argv[1]]()
    asyncio.run(drive(PythonDriver(Client)))
