"""Drives the modified client named by the first argument. Most are wrong, and the conversations must catch them."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from types import SimpleNamespace
from typing import Any

from unroll.client import Client, errors
from unroll.client.conformance.python_driver import PythonDriver, drive
from unroll.client.exchange import Request, Response
from unroll.client.retries import Retries
from unroll.client.rollout_calls import RolledStep, Rollout, RolloutCall, _arrays
from unroll.client.session_calls import SessionCalls
from unroll.client.stream_calls import ControlCall, StepsCall, StreamCalls
from unroll.client.stream_rollouts import StreamRollout


def never_retries() -> None:
    Retries.pause = lambda self, retry_after=None: None  # type: ignore[method-assign]


def retries_without_position() -> None:
    attempt = Client._attempt

    def changed(self: Client, request: Request) -> Response:
        request.headers.pop("Unroll-Position", None)
        return attempt(self, request)

    Client._attempt = changed  # type: ignore[method-assign]


def applies_twice() -> None:
    """After a lost answer, asks for the session's position and sends the step again at that position."""
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
    """Adopts the position of the resumed session and treats chunks in flight as done."""
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
    """Accepts outputs without comparing their position with that of the step."""
    receive = StepsCall.receive

    def changed(self: StepsCall, handle: int, end: int, outputs: Any) -> None:
        receive(self, handle, int(self.positions[self._rows[handle]]) + self.steps, outputs)

    StepsCall.receive = changed  # type: ignore[method-assign]


def begins_anew() -> None:
    """Silently opens a new session when one is lost."""
    apply = SessionCalls._apply

    def changed(self: SessionCalls, content: bytes, chunk: int | None, position: int | None) -> Any:
        try:
            return (yield from apply(self, content, chunk, position))
        except (errors.SessionUnknown, errors.SessionGone):
            again = yield from self.open(self._catalogue, self.model.name, self.id)
            self.position = again.position
            return (yield from apply(self, content, chunk, 0))

    SessionCalls._apply = changed  # type: ignore[method-assign]


def forgets_where_a_rollout_ended() -> None:
    SessionCalls.rolled_out = lambda self, position, outputs: None  # type: ignore[method-assign]
    StreamRollout._advance = lambda self: None  # type: ignore[method-assign]


def yields_steps_again() -> None:
    """After a broken connection, yields the steps of a rollout again from the first."""
    restart = Rollout.restart

    def changed(self: Rollout) -> None:
        restart(self)
        self._yielded = self.members["position"]

    Rollout.restart = changed  # type: ignore[method-assign]


def takes_a_cut_for_the_end() -> None:
    def roll_out(self: Client, call: RolloutCall) -> Iterator[RolledStep]:
        with suppress(OSError, HTTPException):
            for content in self._receive(call.begin()):
                yield from call.receive(content)

    Client.roll_out = roll_out  # type: ignore[method-assign]


def rolls_out_the_rest() -> None:
    """After a broken connection, requests the missing steps as a new rollout from the last position received."""
    restart = Rollout.restart

    def changed(self: Rollout) -> None:
        done = self._reached - self.members["position"]
        self.members |= {"position": self._reached, "steps": self.members["steps"] - done}
        restart(self)

    Rollout.restart = changed  # type: ignore[method-assign]


def never_stops() -> None:
    """Does not stop abandoned rollouts."""
    roll_out, left = Client.roll_out, []

    def changed(self: Client, call: RolloutCall) -> Iterator[RolledStep]:
        left.append(roll_out(self, call))
        for step in left[-1]:  # noqa: UP028 that would close it
            yield step

    Client.roll_out = changed  # type: ignore[method-assign]
    StreamCalls.stop = lambda self, rollout: setattr(rollout.place, "rollout", None)  # type: ignore[method-assign]


def yields_at_the_end() -> None:
    """Yields the steps of a rollout only once all have arrived, so the caller cannot act in between."""
    roll_out = Client.roll_out

    def changed(self: Client, call: RolloutCall) -> Iterator[RolledStep]:
        yield from list(roll_out(self, call))

    Client.roll_out = changed  # type: ignore[method-assign]


def takes_rolled_steps_for_outputs() -> None:
    """Mistakes the steps of a rollout for the outputs of another session."""
    running = StreamCalls._running

    def changed(self: StreamCalls, handle: int) -> Any:
        for place in self._places.values():
            if (call := place.call) is not None:
                end = int(call.positions[call._rows[place.handle]]) + call.steps
                taken = partial(call.receive, place.handle, end)
                return SimpleNamespace(receive=lambda _, arrays, taken=taken: taken(arrays[1:]), end=lambda: None)
        return running(self, handle)

    StreamCalls._running = changed  # type: ignore[method-assign]


def takes_late_steps() -> None:
    """Mistakes late steps of a stopped rollout for steps of the next one."""

    def running(self: StreamCalls, handle: int) -> StreamRollout | None:
        return self._places[handle].rollout

    StreamCalls._running = running  # type: ignore[method-assign]


def rollouts_in_json() -> None:
    """A correct client that requests rollouts on streams in JSON."""
    message, receive = StreamRollout.message, StreamCalls._receive_text

    def changed(self: StreamCalls, document: dict[str, Any]) -> None:
        if document["op"] == "rolling" and (rollout := self._running(document["handle"])) is not None:
            model = self.model
            inputs, outputs = _arrays(model.inputs, document["inputs"]), _arrays(model.outputs, document["outputs"])
            rollout.receive(document["position"], [*inputs, *outputs])
        receive(self, document)

    StreamRollout.message = lambda self: json.dumps(json.loads(message(self)) | {"values": "json"})  # type: ignore[method-assign]
    StreamCalls._receive_text = changed  # type: ignore[method-assign]


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
        forgets_where_a_rollout_ended,
        yields_steps_again,
        takes_a_cut_for_the_end,
        rolls_out_the_rest,
        never_stops,
        yields_at_the_end,
        takes_rolled_steps_for_outputs,
        takes_late_steps,
    )
}

if __name__ == "__main__":
    {**WRONGS, "rollouts_in_json": rollouts_in_json}[sys.argv[1]]()
    asyncio.run(drive(PythonDriver(Client)))
