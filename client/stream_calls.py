"""A stream without I/O: which sessions it has, what is unanswered, and what each message means.

`Stream` and `AsyncStream` move the messages. After a broken connection they connect again: then the sessions are
resumed, and what is unanswered is sent again. Steps carry their position, so the server applies each once.
"""

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from unroll.client.errors import DeadlineExceeded, InvalidInput, ServerError, SessionExists, SomeFailed, UnrollError
from unroll.client.frames import pack_steps, unpack_outputs
from unroll.client.session_calls import Durability, Mode
from unroll.client.tensors import ArrayLike, Arrays, Model

Message = str | bytes


class Place:
    """A session's place on a stream.

    Attributes:
        handle: The session's number on the stream.
        id, position, durability: As of the session.
        lost: Why the session cannot be stepped any more.
        call: Its steps that are unanswered.
    """

    __slots__ = ("call", "durability", "handle", "id", "lost", "position")

    def __init__(self, handle: int, session_id: str, position: int, durability: str) -> None:
        self.handle = handle
        self.id = session_id
        self.position = position
        self.durability = durability
        self.lost: ServerError | None = None
        self.call: StepsCall | None = None


class Call:
    """Something that is asked for several sessions, each of which is answered by itself.

    Attributes:
        unanswered: Keys of the sessions that have no answer.
        again: Keys of those that are refused for now, and why.
        retry_after: Seconds after which these may be asked again.
        on_settled: Called when the last answer has come.
    """

    def __init__(self, keys: Iterable[int]) -> None:
        self.unanswered = set(keys)
        self.again: dict[int, ServerError] = {}
        self.retry_after = 0.0
        self.on_settled: Callable[[], object] | None = None

    @property
    def settled(self) -> bool:
        return not self.unanswered

    @property
    def complete(self) -> bool:
        return not (self.unanswered or self.again)

    def begin(self) -> None:
        """What was refused for now is asked again."""
        self.unanswered |= self.again.keys()
        self.again.clear()
        self.retry_after = 0.0

    def refuse(self, key: int, error: ServerError) -> bool:
        """Note a refusal. Returns whether it is final: those for now say when to come again."""
        if error.retry_after is None and not isinstance(error, DeadlineExceeded):
            return True
        self.again[key] = error
        self.retry_after = max(self.retry_after, error.retry_after or 0.0)
        self.answer(key)
        return False

    def answer(self, key: int) -> None:
        self.unanswered.discard(key)
        if not self.unanswered and self.on_settled is not None:
            self.on_settled()


class ControlCall(Call):
    """A control message. Keys are handles.

    Attributes:
        items: What the server answered, by handle.
    """

    def __init__(self, op: Literal["open", "close"], specs: Mapping[int, dict[str, Any]]) -> None:
        super().__init__(specs)
        self._op = op
        self._specs = specs
        self._sent = False
        self.items: dict[int, dict[str, Any]] = {}

    def message(self) -> str:
        """One that is sent a second time may have been handled the first time."""
        handles = sorted(self.unanswered)
        if self._op == "close":
            return json.dumps({"op": "close", "handles": handles})
        specs = [self._specs[handle] for handle in handles]
        if self._sent:
            specs = [spec | {"mode": "resume" if spec["mode"] == "resume" else "either"} for spec in specs]
        self._sent = True
        return json.dumps({"op": "open", "sessions": specs})

    def receive(self, items: Sequence[dict[str, Any]]) -> None:
        for item in items:
            error = _error_of(item)
            if error is None or self.refuse(item["handle"], error):
                self.items[item["handle"]] = item
                self.answer(item["handle"])

    def fail(self, error: ServerError) -> None:
        """The whole message is refused."""
        self.receive([{"handle": handle, "error": error.members} for handle in [*self.unanswered]])

    def give_up(self) -> None:
        self.items |= {handle: {"handle": handle, "error": error.members} for handle, error in self.again.items()}


class StepsCall(Call):
    """T time steps for each of N sessions, and their outputs as they arrive. Keys are rows.

    Raises:
        InvalidInput: A session is named twice.
    """

    def __init__(self, model: Model, places: Sequence[Place], inputs: Sequence[np.ndarray]) -> None:
        super().__init__(range(len(places)))
        self._model = model
        self._places = places
        self.inputs = inputs
        self.steps: int = inputs[0].shape[1]
        self.positions = np.array([place.position for place in places], np.uint64)
        self.handles = np.array([place.handle for place in places], np.uint32)
        self._rows = {place.handle: row for row, place in enumerate(places)}
        if len(self._rows) != len(places):
            raise InvalidInput("each session may be stepped once in a call: use `steps` for several time steps")
        self._outputs = [
            np.zeros((len(places), *((self.steps,) if spec.time else ()), *spec.shape), spec.numpy)
            for spec in model.outputs
        ]
        self._errors: dict[int, ServerError] = {}
        for place in places:
            place.call = self
            if place.lost is not None:
                self.fail(place.handle, place.lost)

    def receive(self, handle: int, end: int, outputs: Sequence[np.ndarray]) -> None:
        """The outputs of a session, which is then at `end`."""
        row = self._rows[handle]
        if row in self.unanswered and end == self.positions[row] + self.steps:
            for kept, array in zip(self._outputs, outputs, strict=True):
                kept[row] = array
            self._places[row].position = end
            self.answer(row)

    def fail(self, handle: int, error: ServerError) -> None:
        row = self._rows[handle]
        if row in self.unanswered and self.refuse(row, error):
            self._errors[row] = error
            self.answer(row)

    def give_up(self) -> None:
        self._errors |= self.again

    def end(self) -> None:
        """Its caller has the result, or waits no longer."""
        for place in self._places:
            if place.call is self:
                place.call = None

    def result(self, *, chunk: bool, several: bool) -> Arrays:
        """The outputs, each (N, T, *shape), without the axes that the caller has not.

        Raises:
            SomeFailed: Some sessions failed. If there is only one: its error.
        """
        if len(self._places) == 1 and self._errors:
            raise self._errors[0]
        arrays = [
            array[:, 0] if spec.time and not chunk else array
            for spec, array in zip(self._model.outputs, self._outputs, strict=True)
        ]
        outputs = self._model.outputs_of(arrays if several else [array[0] for array in arrays])
        if self._errors:
            raise SomeFailed(self._errors, outputs)
        return outputs


class StreamCalls:
    """What is to be sent on a stream of the model, and what its answers mean."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._places: dict[int, Place] = {}
        self._controls: list[ControlCall] = []  # sent, in order
        self._next_handle = 0

    # ── calls ────────────────────────────────────────────────────────────────────────────────────

    def open(
        self,
        sessions: int | Sequence[str],
        mode: Mode,
        durability: Durability | None,
        static: Mapping[str, ArrayLike] | None,
    ) -> ControlCall:
        """sessions: how many, or their ids. Raises InvalidInput."""
        if isinstance(sessions, int):
            if mode != "new":
                raise InvalidInput(f"mode {mode!r} needs session ids")
            sessions = [secrets.token_urlsafe(16) for _ in range(sessions)]
        if durability == "client":
            raise InvalidInput("a state that the client holds is not sent over a stream: use `Client.session`")
        first = None if mode == "resume" and static is None else self.model.static_of(static)
        begin = {"mode": mode, "durability": durability, "static": first}
        begin = {name: value for name, value in begin.items() if value is not None}
        handles = range(self._next_handle, self._next_handle + len(sessions))
        self._next_handle = handles.stop
        return ControlCall(
            "open",
            {
                handle: {"handle": handle, "session_id": session_id, **begin}
                for handle, session_id in zip(handles, sessions, strict=True)
            },
        )

    def opened(self, call: ControlCall, mode: Mode) -> list[Place | ServerError]:
        """What `open` was answered for each session."""
        found: list[Place | ServerError] = []
        for handle, item in sorted(call.items.items()):
            error = _error_of(item)
            if error is not None:
                found.append(error)
                continue
            place = Place(handle, item["session_id"], item["position"], item["durability"])
            self._places[handle] = place
            if mode == "new" and place.position:  # the message was repeated, and found another's session
                found.append(SessionExists(f"session {place.id!r} is open", members={"position": place.position}))
            else:
                found.append(place)
        return found

    def steps(self, places: Sequence[Place], inputs: ArrayLike, *, chunk: bool, several: bool) -> StepsCall:
        """Raises InvalidInput."""
        leading: Literal["", "T", "N", "NT"] = ("NT" if chunk else "N") if several else ("T" if chunk else "")
        arrays = self.model.inputs_of(inputs, leading)
        if several and len(arrays[0]) != len(places):
            raise InvalidInput(f"inputs of {len(arrays[0])} sessions were given for {len(places)} sessions")
        if not chunk:
            arrays = [array[:, np.newaxis] if several else array[np.newaxis] for array in arrays]
        return StepsCall(self.model, places, arrays if several else [array[np.newaxis] for array in arrays])

    def close(self, places: Sequence[Place]) -> ControlCall:
        return ControlCall("close", {place.handle: {} for place in places})

    def closed(self, places: Sequence[Place]) -> None:
        for place in places:
            self._places.pop(place.handle, None)

    # ── messages ─────────────────────────────────────────────────────────────────────────────────

    def control(self, call: ControlCall) -> str:
        """The message, whose answer is expected from now on."""
        self._controls.append(call)
        return call.message()

    def frames(self, calls: Sequence[StepsCall]) -> Iterator[bytes]:
        """The steps that have no outputs yet: those of equal lengths together."""
        by_steps: dict[int, list[tuple[StepsCall, list[int]]]] = {}
        for call in calls:
            if rows := sorted(call.unanswered):
                by_steps.setdefault(call.steps, []).append((call, rows))
        for steps, parts in by_steps.items():
            handles = np.concatenate([call.handles[rows] for call, rows in parts])
            positions = np.concatenate([call.positions[rows] for call, rows in parts])
            inputs = [
                np.concatenate([call.inputs[i][rows] for call, rows in parts]) for i in range(len(self.model.inputs))
            ]
            yield from pack_steps(handles, steps, positions, inputs)

    def resume(self) -> ControlCall | None:
        """After a new connection: what opens the sessions again, if there are any."""
        self._controls.clear()
        specs = {
            handle: {"handle": handle, "session_id": place.id, "mode": "resume"}
            for handle, place in self._places.items()
            if place.lost is None
        }
        return ControlCall("open", specs) if specs else None

    def resumed(self, call: ControlCall) -> None:
        """Steps of sessions that are lost fail. Raises ServerError if the server asks to come again."""
        for refused in call.again.values():
            raise refused
        for handle, item in call.items.items():
            if (error := _error_of(item)) is not None:
                place = self._places[handle]
                place.lost = error
                if place.call is not None:
                    place.call.fail(handle, error)

    def receive(self, message: Message) -> None:
        """Raises UnrollError if the server does not keep to the protocol."""
        if isinstance(message, str):
            self._receive_text(json.loads(message))
            return
        try:
            entries, columns = unpack_outputs(message, self.model.outputs)
        except ValueError as error:
            raise UnrollError(f"the server sent a frame that is none of {self.model.name!r}: {error}") from error
        for (handle, _, end), *outputs in zip(entries.tolist(), *columns, strict=True):
            place = self._places.get(handle)
            if place is not None and place.call is not None:
                place.call.receive(handle, end, outputs)

    def _receive_text(self, document: dict[str, Any]) -> None:
        if document["op"] in {"opened", "closed"}:
            self._controls.pop(0).receive(document["sessions"])
        elif document["op"] == "error":
            error = ServerError.of(document["code"], document["detail"], members=document)
            place = self._places.get(document.get("handle", -1))
            if "position" in document:
                if place is not None and place.call is not None:
                    place.call.fail(place.handle, error)
            elif self._controls:
                self._controls.pop(0).fail(error)
            else:
                raise error


def _error_of(item: Mapping[str, Any]) -> ServerError | None:
    error = item.get("error")
    return None if error is None else ServerError.of(error["code"], error["detail"], members=error)
