"""A stream without I/O: its sessions, its unanswered calls, and the interpretation of messages.

`Stream` and `AsyncStream` transport the messages. After a broken connection they reconnect, resume the sessions, and
send unanswered calls again. Steps carry their position, so the server applies each once.
"""

import json
import operator
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal
from weakref import WeakSet

import numpy as np

from unroll.client.errors import (
    InvalidInput,
    InvalidRequest,
    ServerError,
    SessionClosed,
    SessionExists,
    SessionGone,
    SessionUnknown,
    SomeFailed,
    UnrollError,
)
from unroll.client.frames import ROLLED, pack_steps, unpack_outputs
from unroll.client.places import Place
from unroll.client.retries import refused_for_now
from unroll.client.rollout_calls import RolloutWish
from unroll.client.session_calls import Durability, Mode
from unroll.client.stream_rollouts import StreamRollout
from unroll.client.tensors import ArrayLike, Arrays, Model

Message = str | bytes

#: Limits of one control message.
_MOST_SPECS, _MOST_CHARACTERS = 1000, 2**18


class Call:
    """A request about several sessions, each of which gets its own answer.

    Attributes:
        unanswered: The keys of sessions without an answer.
        again: The temporary refusals, by key.
        retry_after: Seconds after which refused sessions may be retried.
        on_settled: Called when the last answer has arrived.
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
        """Start an attempt: temporary refusals count as unanswered again."""
        self.unanswered |= self.again.keys()
        self.again.clear()
        self.retry_after = 0.0

    def refuse(self, key: int, error: ServerError) -> bool:
        """Record a refusal. Returns whether it is final rather than temporary."""
        if not refused_for_now(error):
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
    """A control message about several sessions; the keys are handles.

    Attributes:
        items: The server's answers, by handle.
    """

    def __init__(self, op: Literal["open", "close", "detach", "stop"], specs: Mapping[int, dict[str, Any]]) -> None:
        super().__init__(specs)
        self.op = op
        self._specs = specs
        self._sent = False
        self.items: dict[int, dict[str, Any]] = {}

    def messages(self) -> Iterator[tuple[list[int], str]]:
        """Yield the messages with their handles. A repeated one opens with mode either: the first may have arrived."""
        repeated, self._sent = self._sent, True
        handles: list[int] = []
        texts: list[str] = []
        for handle in sorted(self.unanswered):
            spec = self._specs[handle]
            if repeated and spec.get("mode") == "new":
                spec = spec | {"mode": "either"}
            text = json.dumps(spec) if self.op == "open" else str(handle)
            if len(texts) == _MOST_SPECS or (texts and sum(map(len, texts)) + len(text) > _MOST_CHARACTERS):
                yield handles, self._message(texts)
                handles, texts = [], []
            handles.append(handle)
            texts.append(text)
        if texts:
            yield handles, self._message(texts)

    def _message(self, texts: Sequence[str]) -> str:
        if self.op == "stop":
            return f'{{"op": "stop", "handle": {texts[0]}}}'
        member = "sessions" if self.op == "open" else "handles"
        return f'{{"op": "{self.op}", "{member}": [{", ".join(texts)}]}}'

    def receive(self, items: Sequence[dict[str, Any]]) -> None:
        for item in items:
            error = ServerError.in_item(item)
            if error is None or self.refuse(item["handle"], error):
                self.items[item["handle"]] = item
                self.answer(item["handle"])

    def ask_again(self) -> None:
        """Count opened sessions as unanswered again, because their connection is gone."""
        opened = [handle for handle, item in self.items.items() if "error" not in item]
        self.unanswered.update(opened)
        for handle in opened:
            del self.items[handle]

    def give_up(self) -> None:
        self.items |= {handle: {"handle": handle, "error": error.members} for handle, error in self.again.items()}

    def result(self) -> None:
        """Raise ServerError if a session could not be closed."""
        for item in self.items.values():
            error = ServerError.in_item(item)
            if error is not None and not isinstance(error, SessionGone | SessionUnknown | InvalidRequest):
                raise error


class StepsCall(Call):
    """T time steps for each of N sessions, and their outputs as they arrive; the keys are rows.

    Raises:
        InvalidInput: A session occurs twice.
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
            raise InvalidInput("a call may step each session only once: use `steps` for several time steps")
        self._outputs = [
            np.zeros((len(places), *((self.steps,) if spec.time else ()), *spec.shape), spec.numpy)
            for spec in model.outputs
        ]
        self._errors: dict[int, ServerError] = {}
        self._ends: dict[int, tuple[int, Sequence[np.ndarray]]] = {}
        for place in places:
            place.call = self
            if place.lost is not None:
                self.fail(place.handle, place.lost)

    def receive(self, handle: int, end: int, outputs: Sequence[np.ndarray]) -> None:
        """Receive the outputs of a session that has reached the position `end`."""
        row = self._rows[handle]
        if row in self.unanswered and end == self.positions[row] + self.steps:
            for kept, array in zip(self._outputs, outputs, strict=True):
                kept[row] = array
            self._ends[row] = end, outputs
            self.answer(row)

    def fail(self, handle: int, error: ServerError) -> None:
        row = self._rows[handle]
        if row in self.unanswered and self.refuse(row, error):
            self._errors[row] = error
            self.answer(row)

    def give_up(self) -> None:
        self._errors |= self.again

    def end(self) -> None:
        """Detach from the sessions: the caller has the result, or no longer waits for it."""
        for place in self._places:
            if place.call is self:
                place.call = None

    def result(self, *, chunk: bool, several: bool) -> Arrays:
        """Return the outputs, each (N, T, *shape), without the axes that the caller's inputs lack.

        Positions advance only here: a caller that never gets the outputs must send the steps again.

        Raises:
            SomeFailed: Some sessions failed. A single session raises its own error instead.
        """
        for row, (end, last) in self._ends.items():
            place = self._places[row]
            place.position, place.last = end, last
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
    """The calls and messages of one stream."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._places: dict[int, Place] = {}
        #: Unanswered control messages and rollouts in order of sending, with their handles.
        self._controls: list[tuple[ControlCall | StreamRollout, list[int]]] = []
        self._opening: WeakSet[ControlCall] = WeakSet()
        self._next_handle = 0

    # ── calls ────────────────────────────────────────────────────────────────────────────────────

    def open(
        self,
        sessions: int | Sequence[str],
        mode: Mode,
        durability: Durability | None,
        static: Mapping[str, ArrayLike] | None,
    ) -> ControlCall:
        """Open sessions, given by number or by ids. Raises InvalidInput."""
        if isinstance(sessions, str):
            raise InvalidInput(f"give a list of ids: [{sessions!r}]")
        if not isinstance(sessions, Sequence):
            sessions = operator.index(sessions)
            if mode != "new":
                raise InvalidInput(f"mode {mode!r} needs session ids")
            sessions = [secrets.token_urlsafe(16) for _ in range(sessions)]
        if durability == "client":
            raise InvalidInput("a stream does not carry client-held states: use `Client.session`")
        first = None if mode == "resume" and static is None else self.model.static_of(static)
        begin = {"mode": mode, "durability": durability, "static": first}
        begin = {name: value for name, value in begin.items() if value is not None}
        handles = range(self._next_handle, self._next_handle + len(sessions))
        self._next_handle = handles.stop
        call = ControlCall(
            "open",
            {
                handle: {"handle": handle, "session_id": session_id, **begin}
                for handle, session_id in zip(handles, sessions, strict=True)
            },
        )
        self._opening.add(call)
        return call

    def opened(self, call: ControlCall, mode: Mode) -> tuple[list[Place], list[Place], ServerError | None]:
        """The sessions that the call opened, those that another client had opened, and the first refusal."""
        self._opening.discard(call)
        ours: list[Place] = []
        others: list[Place] = []
        refused = None
        for handle, item in sorted(call.items.items()):
            error = ServerError.in_item(item)
            if error is None:
                place = Place(handle, item["session_id"], item["position"], item["durability"])
                self._places[handle] = place
                if mode != "new" or not place.position:
                    ours.append(place)
                    continue
                others.append(place)  # the repeated message attached to an existing session
                error = SessionExists(f"session {place.id!r} is open", members={"position": place.position})
            refused = refused or error
        return ours, others, refused

    def steps(self, places: Sequence[Place], inputs: ArrayLike, *, chunk: bool, several: bool) -> StepsCall:
        """Make a call that steps the sessions. The values are read immediately. Raises InvalidInput."""
        self._check(places)
        leading: Literal["", "T", "N", "NT"] = ("NT" if chunk else "N") if several else ("T" if chunk else "")
        arrays = self.model.inputs_of(inputs, leading)
        if several and len(arrays[0]) != len(places):
            raise InvalidInput(f"inputs of {len(arrays[0])} sessions were given for {len(places)} sessions")
        if not chunk:
            arrays = [array[:, np.newaxis] if several else array[np.newaxis] for array in arrays]
        copies = [np.array(array if several else array[np.newaxis]) for array in arrays]
        return StepsCall(self.model, places, copies)

    def _check(self, places: Sequence[Place]) -> None:
        if any(place.lost is None and self._places.get(place.handle) is not place for place in places):
            raise InvalidInput("a session belongs to another stream")

    def end(self, op: Literal["close", "detach"], places: Sequence[Place]) -> ControlCall:
        return ControlCall(op, {place.handle: {} for place in places})

    def ended(self, places: Sequence[Place]) -> None:
        for place in places:
            self._places.pop(place.handle, None)
            place.lost = place.lost or SessionClosed(f"session {place.id!r} was closed")
            place.fail(place.lost)

    def rollout(self, place: Place, wish: RolloutWish) -> StreamRollout:
        """Make a rollout of a session. Raises InvalidInput."""
        self._check([place])
        return StreamRollout(self.model, place, wish)

    # ── messages ─────────────────────────────────────────────────────────────────────────────────

    def controls(self, call: ControlCall) -> Iterator[str]:
        """Yield the call's messages, and expect their answers from now on."""
        for handles, message in call.messages():
            self._controls.append((call, handles))
            yield message

    def frames(self, calls: Sequence[StepsCall]) -> Iterator[bytes]:
        """Yield frames with all unanswered steps, grouped by chunk length."""
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

    def roll_out(self, rollout: StreamRollout) -> str:
        """The message that starts a rollout. Raises InvalidInput, or ServerError if the session is lost."""
        place = rollout.place
        if place.lost is not None:
            raise place.lost
        if place.rollout not in (None, rollout):
            raise InvalidInput(f"session {place.id!r} already has a rollout: end that one first")
        place.rollout = rollout
        self._controls.append((rollout, [place.handle]))
        return rollout.message()

    def stop(self, rollout: StreamRollout) -> str | None:
        """End a rollout early. Returns the message that stops it on the server, if it runs there."""
        place = rollout.place
        if place.rollout is not rollout:
            return None
        place.rollout = None
        if rollout.complete or not rollout.sent:
            return None
        call = ControlCall("stop", {place.handle: {}})
        return next(iter(self.controls(call)))

    def resume(self) -> ControlCall | None:
        """Make the call that resumes the sessions, if any, on a new connection. Rollouts count as not sent."""
        self._controls.clear()
        for place in self._places.values():
            if place.rollout is not None:
                place.rollout.sent = False
        for call in self._opening:
            call.ask_again()
        specs = {
            handle: {"handle": handle, "session_id": place.id, "mode": "resume"}
            for handle, place in self._places.items()
            if place.lost is None
        }
        return ControlCall("open", specs) if specs else None

    def resumed(self, call: ControlCall) -> None:
        """Fail the sessions that could not be resumed. Raises ServerError for a temporary refusal."""
        for refused in call.again.values():
            raise refused
        for handle, item in call.items.items():
            if (error := ServerError.in_item(item)) is not None:
                place = self._places[handle]
                place.lost = error
                place.fail(error)

    def receive(self, message: Message) -> None:
        """Process a message. Raises UnrollError if it violates the protocol."""
        if isinstance(message, str):
            self._receive_text(json.loads(message))
            return
        rolled = message[:1] == ROLLED
        try:
            tensors = (*self.model.inputs, *self.model.outputs) if rolled else self.model.outputs
            entries, columns = unpack_outputs(message, tensors)
        except (ValueError, struct.error) as error:
            raise UnrollError(f"the server sent an invalid frame for {self.model.name!r}: {error}") from error
        for (handle, _, end), *outputs in zip(entries.tolist(), *columns, strict=True):
            if rolled:
                if (rollout := self._running(handle)) is not None:
                    rollout.receive(end, outputs)
            elif (place := self._places.get(handle)) is not None and place.call is not None:
                place.call.receive(handle, end, outputs)

    def _receive_text(self, document: dict[str, Any]) -> None:
        op = document["op"]
        if op in {"opened", "closed", "detached", "stopped"}:
            while self._controls:
                call, handles = self._controls.pop(0)
                if isinstance(call, ControlCall):  # rollouts sent before it have started
                    call.receive(document.get("sessions") or [{"handle": handle} for handle in handles])
                    break
        elif op == "rolled":
            if (rollout := self._running(document["handle"])) is not None:
                rollout.end()
        elif op == "error":
            self._receive_error(document, ServerError.of(document["code"], document["detail"], members=document))

    def _receive_error(self, document: dict[str, Any], error: ServerError) -> None:
        if "position" in document:
            place = self._places.get(document["handle"])
            if document.get("rollout"):
                if (rollout := self._running(document["handle"])) is not None:
                    rollout.fail(error)
            elif place is not None and place.call is not None:
                place.call.fail(place.handle, error)
        elif self._controls:
            call, handles = self._controls.pop(0)
            if isinstance(call, StreamRollout):
                call.fail(error)
            else:
                call.receive([{"handle": handle, "error": document} for handle in handles])
        else:
            raise error

    def _running(self, handle: int) -> StreamRollout | None:
        """The rollout that an answer belongs to; None if that was stopped."""
        if self._controls:
            if any(isinstance(call, ControlCall) and call.op == "stop" and handle in at for call, at in self._controls):
                return None
            self._controls = [
                (call, at) for call, at in self._controls if isinstance(call, ControlCall) or handle not in at
            ]
        place = self._places.get(handle)
        return None if place is None else place.rollout
