"""A rollout without I/O: its request, and what its events mean. `Client` and `AsyncClient` receive them.

After a broken connection the request is sent again, and what was yielded already is skipped: the same request at the
same position gives the same steps.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from unroll.client.errors import InvalidInput, ModelUnavailable, ServerError
from unroll.client.exchange import Request, json_request
from unroll.client.retries import RETRIED
from unroll.client.session_calls import SessionCalls
from unroll.client.tensors import ArrayLike, Arrays, Tensor

#: fork: on a copy of the state, the session stays as it is. session: on the session, applied as a whole at the end.
On = Literal["fork", "session"]
#: How inputs are made of outputs, as docs/rollout.md describes it: the object, or a kind that needs no more.
Map = Mapping[str, Any] | str


@dataclass(frozen=True, slots=True, eq=False)
class RolledStep:
    """A time step of a rollout.

    Attributes:
        position: Of the session, or of its copy, after the step.
        inputs: Which the map made: an array of the input's shape, or a dict of several.
        outputs: Likewise.
    """

    position: int
    inputs: Arrays
    outputs: Arrays


class RolloutCall:
    """One rollout.

    Args:
        session: It begins from. Its position advances when a rollout on the session has ended.
        steps: Time steps that are fed back.
        mapped, on: See `Session.rollout`.
        inputs: Given time steps that come first.
        outputs: Of the last time step; None: those that this client had, else those that the server has kept.

    Attributes:
        complete: The last event was received.

    Raises:
        InvalidInput: Nothing was sent.
    """

    def __init__(
        self,
        session: SessionCalls,
        steps: int,
        mapped: Map,
        on: On,
        inputs: ArrayLike | None = None,
        outputs: ArrayLike | None = None,
    ) -> None:
        if on == "session" and session.sealed is not None:
            raise InvalidInput("a state that the client holds is rolled out on a fork")
        self.complete = False
        self._session = session
        self._on = on
        self._last: list[np.ndarray] = []
        model = session.model
        given = [] if inputs is None else model.inputs_of(inputs, "T")
        last = None if given else session.last_outputs() if outputs is None else model.given_outputs(outputs)
        document = {
            "steps": steps,
            "map": {"kind": mapped} if isinstance(mapped, str) else mapped,
            "on": on,
            "position": session.position,
            "inputs": _lists(model.inputs, given) if given else None,
            "outputs": None if last is None else _lists(model.outputs, last),
            "snapshot": None if session.sealed is None else base64.b64encode(session.sealed).decode(),
        }
        self._request = json_request("POST", f"{session.path}/rollout", document)
        self._begin = session.position
        self._yielded = session.position + max(len(given[0]) - 1 if given else 0, 0)

    def begin(self) -> Request:
        """What is to be sent, for the first time or again."""
        self._buffer = b""
        self._reached = self._begin
        return self._request

    def receive(self, content: bytes) -> Iterator[RolledStep]:
        """A part of the response's body. Raises ServerError if the rollout failed."""
        *events, self._buffer = (self._buffer + content).split(b"\n\n")
        for event in events:
            fields = dict(line.split(b": ", 1) for line in event.splitlines())
            document = json.loads(fields[b"data"])
            if fields[b"event"] == b"steps":
                yield from self._steps(document)
            elif fields[b"event"] == b"end":
                self.complete = True
                if self._on == "session":
                    self._session.rolled_out(document["position"], self._last)
            else:
                raise ServerError.of(document["code"], document["detail"], document["status"], document)

    def _steps(self, document: dict[str, Any]) -> Iterator[RolledStep]:
        """The steps of an event that were not yielded yet; of the given ones only the last is."""
        model, begin = self._session.model, self._reached
        self._reached = document["position"]
        inputs = _arrays(model.inputs, document["inputs"])
        outputs = _arrays(model.outputs, document["outputs"])
        self._last = [array[-1:] if spec.time else array for spec, array in zip(model.outputs, outputs, strict=True)]
        for position in range(max(begin, self._yielded) + 1, self._reached + 1):
            at = position - begin - 1
            if not all(spec.time for spec in model.outputs) and position < self._reached:
                continue  # such an output has one value for all steps of an event
            self._yielded = position
            step = [array[at] if spec.time else array for spec, array in zip(model.outputs, outputs, strict=True)]
            fed = [array[at] for array in inputs]
            yield RolledStep(position, model.named_inputs(fed), model.outputs_of(step))


def retry_after(error: ServerError) -> float | None:
    """Seconds after which a rollout that failed so may be sent again. Raises the error if it would only come again."""
    if error.status not in RETRIED or isinstance(error, ModelUnavailable):
        raise error
    return error.retry_after


def _lists(specs: Sequence[Tensor], arrays: Sequence[np.ndarray]) -> object:
    """Arrays as JSON has them."""
    if len(specs) == 1:
        return arrays[0].tolist()
    return {spec.name: array.tolist() for spec, array in zip(specs, arrays, strict=True)}


def _arrays(specs: Sequence[Tensor], value: Any) -> list[np.ndarray]:
    values = [value] if len(specs) == 1 else [value[spec.name] for spec in specs]
    return [np.array(item, spec.numpy) for spec, item in zip(specs, values, strict=True)]
