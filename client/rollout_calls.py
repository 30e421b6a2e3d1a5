"""Rollouts without I/O: the request, and the interpretation of its events.

After a broken connection the request is sent again, and steps that were already yielded are skipped: the same request
at the same position gives the same steps.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from unroll.client.errors import InvalidInput, ModelUnavailable, ServerError
from unroll.client.exchange import Request, post_json
from unroll.client.retries import RETRIED, Retries
from unroll.client.session_calls import SessionCalls
from unroll.client.tensors import ArrayLike, Arrays, Model, Tensor, listed, named

#: fork runs on a copy of the state; session runs on the session, which advances at the end.
On = Literal["fork", "session"]
#: How to compute inputs from outputs, see docs/rollout.md: an object, or just the name of a kind without options.
Map = Mapping[str, Any] | str


@dataclass(frozen=True, slots=True, eq=False)
class RolledStep:
    """A time step of a rollout.

    Attributes:
        position: The position of the session, or of its copy, after the step.
        inputs: The inputs computed by the map: an array of the input's shape, or a dict of several.
        outputs: The outputs, likewise.
    """

    position: int
    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True, slots=True, eq=False)
class RolloutWish:
    """The arguments of a rollout. See `Session.rollout`."""

    steps: int
    map: Map
    on: On
    inputs: ArrayLike | None = None
    outputs: ArrayLike | None = None


class Rollout:
    """A rollout, and how many of its time steps were yielded.

    Args:
        model: The session's model.
        position: The session's position, at which the rollout starts.
        wish: The arguments of the rollout.
        last: The outputs of the last time step, if this client knows them.

    Attributes:
        members: The members of the request.
        complete: Whether all time steps have arrived.
        last: The outputs of the latest event, as for a chunk.

    Raises:
        InvalidInput: An array does not fit; nothing was sent.
    """

    def __init__(self, model: Model, position: int, wish: RolloutWish, last: list[np.ndarray] | None) -> None:
        self.complete = False
        self.last: Sequence[np.ndarray] = []
        self._model = model
        given = [] if wish.inputs is None else model.inputs_of(wish.inputs, "T")
        fed = None if given else last if wish.outputs is None else model.given_outputs(wish.outputs)
        self.members: dict[str, Any] = {
            "steps": wish.steps,
            "map": {"kind": wish.map} if isinstance(wish.map, str) else wish.map,
            "on": wish.on,
            "position": position,
            "inputs": named(model.inputs, [array.tolist() for array in given]) if given else None,
            "outputs": None if fed is None else named(model.outputs, [array.tolist() for array in fed]),
        }
        self._reached = position
        self._yielded = position + max(len(given[0]) - 1 if given else 0, 0)

    def restart(self) -> None:
        """Start over, before the request is sent for the first time or again."""
        self._reached = self.members["position"]

    def steps(self, end: int, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> Iterator[RolledStep]:
        """Yield the new steps of an event; of the steps given as `inputs`, only the last.

        Args:
            end: The position after the event's steps.
            inputs, outputs: Their arrays, as for a chunk.
        """
        model, begin = self._model, self._reached
        self._reached = end
        self.last = [array.copy() for array in outputs]  # the caller may modify the arrays it receives
        timed = all(spec.time for spec in model.outputs)  # an output without time has one value per event
        for position in range(max(begin if timed else end - 1, self._yielded) + 1, end + 1):
            self._yielded = position
            at = position - begin - 1
            step = [array[at] if spec.time else array for spec, array in zip(model.outputs, outputs, strict=True)]
            yield RolledStep(position, named(model.inputs, [array[at] for array in inputs]), model.outputs_of(step))


class RolloutCall(Rollout):
    """A rollout over HTTP.

    Args:
        session: The session, which advances when a rollout on it has ended.
        wish: The arguments of the rollout.

    Raises:
        InvalidInput: An array does not fit; nothing was sent.
    """

    def __init__(self, session: SessionCalls, wish: RolloutWish) -> None:
        if wish.on == "session" and session.sealed is not None:
            raise InvalidInput("a client-held state can only be rolled out on a fork")
        super().__init__(session.model, session.position, wish, session.last_outputs())
        self._session = session
        snapshot = None if session.sealed is None else base64.b64encode(session.sealed).decode()
        self._request = post_json(f"{session.path}/rollout", {**self.members, "snapshot": snapshot})

    def begin(self) -> Request:
        """The request, to send for the first time or again."""
        self._buffer = b""
        self.restart()
        return self._request

    def receive(self, content: bytes) -> Iterator[RolledStep]:
        """Yield the steps in a part of the response's body. Raises ServerError if the rollout failed."""
        *events, self._buffer = (self._buffer + content).split(b"\n\n")
        for event in events:
            fields = dict(line.split(b": ", 1) for line in event.splitlines())
            document = json.loads(fields[b"data"])
            if fields[b"event"] == b"steps":
                made = (
                    _arrays(self._model.inputs, document["inputs"]),
                    _arrays(self._model.outputs, document["outputs"]),
                )
                yield from self.steps(document["position"], *made)
            elif fields[b"event"] == b"end":
                self.complete = True
                if self.members["on"] == "session":
                    self._session.rolled_out(document["position"], self.last)
            else:
                raise ServerError.of(document["code"], document["detail"], document["status"], document)

    def pause(self, error: Exception, retries: Retries) -> float:
        """Seconds until the request is retried after this error.

        Raises:
            ServerError, ConnectionFailed: A retry would fail again, or time is up.
        """
        if not isinstance(error, ServerError):
            return retries.reconnect(error)
        for_now = error.status in RETRIED and not isinstance(error, ModelUnavailable)
        if not for_now or (pause := retries.pause(error.retry_after)) is None:
            raise error
        return pause


def _arrays(specs: Sequence[Tensor], value: Any) -> list[np.ndarray]:
    return [np.array(item, spec.numpy) for spec, item in zip(specs, listed(specs, value), strict=True)]
