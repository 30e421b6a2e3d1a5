"""The operations on a session, and the client's knowledge of it: id, position, model, durability."""

import base64
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack

import numpy as np

from unroll.client.errors import InvalidInput, SessionClosed, SessionExists, SessionGone, SessionUnknown
from unroll.client.exchange import RAW, Exchange, Request, Response, model_path, post_json, session_path
from unroll.client.model_calls import Catalogue, split_outputs
from unroll.client.tensors import ArrayLike, Arrays, Model

Durability = Literal["memory", "stored", "client"]
#: The content of a snapshot, or the path of its file.
Snapshot = bytes | Path | str

#: new opens a session; resume attaches to an open one; either attaches, or opens one if the id is unknown.
Mode = Literal["new", "resume", "either"]

_STATE = {"Content-Type": RAW}


class Start(TypedDict, total=False):
    """The options of a new session."""

    durability: Durability | None
    static: Mapping[str, ArrayLike] | None
    snapshot: Snapshot | None


class SessionCalls:
    """One session. Each operation is a generator of requests, see `exchange.py`.

    Attributes:
        model: The session's model version, fixed for its lifetime.
        position: The number of time steps that it has consumed, as far as this client knows.
        durability: memory, stored or client.
        sealed: The sealed snapshot, if this client holds the state.
    """

    def __init__(self, catalogue: Catalogue, model: Model, info: Mapping[str, Any], sealed: bytes | None) -> None:
        self.id: str = info["session_id"]
        self.model = model
        self.position: int = info["position"]
        self.durability: str = info["durability"]
        self._catalogue = catalogue
        self.path = session_path(f"{model.name}:{model.version}", self.id)
        self.sealed = sealed
        self._last: Callable[[], Sequence[np.ndarray]] | None = None  # the outputs of the last chunk, if known

    @classmethod
    def start(
        cls, catalogue: Catalogue, model: str, session_id: str | None, mode: Mode, **start: Unpack[Start]
    ) -> Exchange[Self]:
        """Open a session, attach to one, or either. See `Client.session` for arguments and errors."""
        if mode == "new":
            return (yield from cls.open(catalogue, model, session_id, **start))
        if session_id is None:
            raise InvalidInput(f"mode {mode!r} needs a session_id")
        if mode == "resume" and (given := [name for name, value in start.items() if value is not None]):
            raise InvalidInput(
                f"a session that is already open does not take {given[0]}: omit it, or use mode 'either'"
            )
        try:
            return (yield from cls.attach(catalogue, model, session_id))
        except SessionUnknown:
            if mode == "resume":
                raise
        try:
            return (yield from cls.open(catalogue, model, session_id, **start))
        except SessionExists:  # another client has just opened it
            return (yield from cls.attach(catalogue, model, session_id))

    @classmethod
    def open(cls, catalogue: Catalogue, model: str, session_id: str | None, **start: Unpack[Start]) -> Exchange[Self]:
        """Open a new session."""
        static, snapshot = start.get("static"), start.get("snapshot")
        first = None if static is None else (yield from catalogue.model(model)).static_of(static)
        content = None if snapshot is None else read_snapshot(snapshot)
        chosen = session_id or secrets.token_urlsafe(16)  # a retry must use the same id
        document = {
            "session_id": chosen,
            "durability": start.get("durability"),
            "static": first,
            "snapshot": None if content is None else base64.b64encode(content).decode(),
        }
        response = yield post_json(f"{model_path(model)}/sessions", document)
        error = response.error()
        if (
            isinstance(error, SessionExists)
            and response.repeated
            and error.members.get("position") == _position(content)
        ):
            return (yield from cls.attach(catalogue, model, chosen))
        return (yield from cls._from(catalogue, response))

    @classmethod
    def attach(cls, catalogue: Catalogue, model: str, session_id: str) -> Exchange[Self]:
        """Attach to an open session."""
        response = yield Request("GET", session_path(model, session_id))
        return (yield from cls._from(catalogue, response))

    @classmethod
    def _from(cls, catalogue: Catalogue, response: Response) -> Exchange[Self]:
        info = response.checked().json()
        model = yield from catalogue.model(f"{info['model']}:{info['model_version']}")
        sealed = base64.b64decode(info["snapshot"]) if info["durability"] == "client" else None
        return cls(catalogue, model, info, sealed)

    def step(self, values: ArrayLike, position: int | None) -> Exchange[Arrays]:
        """Apply one time step; the outputs have no time axis. The values are read immediately."""
        arrays = self.model.inputs_of(values, "")
        return self._apply(b"".join([array.tobytes() for array in arrays]), None, position)

    def steps(self, values: ArrayLike, position: int | None) -> Exchange[Arrays]:
        """Apply T time steps. The values are read immediately."""
        arrays = self.model.inputs_of(values, "T")
        return self._apply(b"".join([array.tobytes() for array in arrays]), len(arrays[0]), position)

    def _apply(self, content: bytes, chunk: int | None, position: int | None) -> Exchange[Arrays]:
        """Send a chunk of `chunk` time steps; None for a single step."""
        begin, steps = self.position if position is None else position, chunk or 1
        headers = {"Content-Type": RAW, "Unroll-Position": str(begin), "Unroll-Steps": str(steps)}
        if self.sealed is not None:
            headers["Unroll-Snapshot-Length"] = str(len(self.sealed))
            content = self.sealed + content
        response = yield Request("POST", f"{self.path}/steps", content, headers)
        body = memoryview(response.checked().body)
        length = 0 if self.sealed is None else response.number("unroll-snapshot-length")
        self._last = partial(split_outputs, self.model, response, body[length:], steps)
        outputs = self._last()
        self.position = response.number("unroll-position")
        if self.sealed is not None:
            self.sealed = bytes(body[:length])
        if chunk is None:
            specs = self.model.outputs
            outputs = [array[0] if spec.time else array for spec, array in zip(specs, outputs, strict=True)]
        return self.model.outputs_of(outputs)

    def refresh(self) -> Exchange[int]:
        """Adopt the session's position on the server."""
        if self.sealed is None:
            response = yield Request("GET", self.path)
            self._move(response.checked().json()["position"])
        return self.position

    def last_outputs(self) -> list[np.ndarray] | None:
        """The outputs of the last time step, each (*shape), if known."""
        return None if self._last is None else self.model.last_step(self._last())

    def rolled_out(self, position: int, outputs: Sequence[np.ndarray]) -> None:
        """Record the end of a rollout on the session: its position, and the outputs of its last event."""
        self.position = position
        self._last = lambda: outputs

    def _move(self, position: int) -> None:
        """Adopt a position; if it is new, the last outputs are no longer known."""
        if position != self.position:
            self._last = None
        self.position = position

    def fork(self, session_id: str | None = None) -> Exchange[Self]:
        """Open a second session in the same state."""
        last = self._last
        forked = yield from self._forked(session_id)
        forked._last = last
        return forked

    def _forked(self, session_id: str | None = None) -> Exchange[Self]:
        if self.sealed is not None:
            return (yield from self._reopen(session_id, _unsealed(self.sealed)))
        fork_id = session_id or secrets.token_urlsafe(16)
        response = yield post_json(f"{self.path}/fork", {"session_id": fork_id})
        error = response.error()
        if isinstance(error, SessionExists) and response.repeated and error.members.get("position") == self.position:
            return (yield from self.attach(self._catalogue, self.model.name, fork_id))
        return (yield from self._from(self._catalogue, response))

    def snapshot(self) -> Exchange[bytes]:
        """Get the session's state and position, bound to its model."""
        if self.sealed is not None:
            return _unsealed(self.sealed)
        response = yield Request("GET", f"{self.path}/state")
        return response.checked().body

    def rewind(self, snapshot: Snapshot) -> Exchange[int]:
        """Restore the state of a snapshot. Returns the position."""
        content = read_snapshot(snapshot)
        if self.sealed is not None:
            earlier = yield from self._reopen(self.id, content)
            self.sealed, self.position, self._last = earlier.sealed, earlier.position, None
            return self.position
        response = yield Request("PUT", f"{self.path}/state", content, _STATE)
        self.position, self._last = response.checked().json()["position"], None
        return self.position

    def _reopen(self, session_id: str | None, snapshot: bytes) -> Exchange[Self]:
        """Open a client-held session from a snapshot, which the server seals for the id."""
        model = f"{self.model.name}:{self.model.version}"
        return self.open(self._catalogue, model, session_id, durability="client", snapshot=snapshot)

    def close(self) -> Exchange[None]:
        """End the session. A session that is already closed is not an error."""
        if self.sealed is None:
            response = yield Request("DELETE", self.path)
            error = response.error()
            if isinstance(error, SessionClosed) or (
                response.repeated and isinstance(error, SessionGone | SessionUnknown)
            ):
                return
            response.checked()


class SessionFacts:
    """The properties of a session, for both clients."""

    _opened: SessionCalls | None = None

    @property
    def _calls(self) -> SessionCalls:
        """Raises InvalidInput if the session is not open yet."""
        if self._opened is None:
            raise InvalidInput(
                "the session is not open yet: write `session = await client.session(…)`, or "
                "`async with client.session(…) as session`"
            )
        return self._opened

    def __repr__(self) -> str:
        if self._opened is None:
            return f"<{type(self).__name__}, not open>"
        return f"<{type(self).__name__} {self.id!r} of {self.model.name}:{self.model.version} at {self.position}>"

    @property
    def id(self) -> str:
        return self._calls.id

    @property
    def model(self) -> Model:
        """The session's model version, fixed for its lifetime."""
        return self._calls.model

    @property
    def position(self) -> int:
        """The number of time steps that the session has consumed, as far as this client knows."""
        return self._calls.position

    @property
    def durability(self) -> str:
        return self._calls.durability


def _position(snapshot: bytes | None) -> int:
    """The position of a snapshot, in its bytes 40 to 48; 0 without one."""
    return 0 if snapshot is None else int.from_bytes(snapshot[40:48], "little")


def _unsealed(sealed: bytes) -> bytes:
    """The snapshot within a sealed one: between a 12-byte header with the session id (its length is byte 6) and a
    32-byte signature."""
    return sealed[12 + sealed[6] : -32]


def read_snapshot(snapshot: Snapshot) -> bytes:
    """The bytes of a snapshot. Raises InvalidInput if its file cannot be read."""
    if isinstance(snapshot, bytes):
        return snapshot
    try:
        return Path(snapshot).read_bytes()
    except OSError as error:
        raise InvalidInput(f"the snapshot cannot be read: {error}") from error
