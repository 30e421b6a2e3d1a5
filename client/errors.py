"""What a client raises. Every refusal of the server has a class of its own, named after its stable code.

UnrollError
├── InvalidInput         an array does not fit the model; nothing was sent
├── SomeFailed           of the sessions in one frame; the steps of the others were applied
├── ConnectionFailed     no server answered, for as long as the client retries
└── ServerError          the server refused or failed
    ├── InvalidRequest   the request is wrong: InvalidShape, NonFiniteInput, SnapshotInvalid, …
    ├── SessionError     where the session is, or is no more: PositionGap, SessionExpired, …
    ├── Overloaded       the server has no room now, for as long as the client retries: QueueFull, …
    └── ExecutionError   the request was accepted and failed: DeadlineExceeded, NonFiniteOutput, …
"""

from collections.abc import Mapping
from typing import Any, ClassVar


class UnrollError(Exception):
    """The base of everything that a client raises."""


class InvalidInput(UnrollError, ValueError):
    """An array, a name or a snapshot does not fit; nothing was sent."""


class ConnectionFailed(UnrollError, ConnectionError):
    """No server answered within `retry_for`. The session's last step may have been applied: send it again."""


class SomeFailed(UnrollError):
    """Steps of several sessions were sent at once, and some were refused. Those of the others were applied.

    Attributes:
        errors: By the session's index in the call.
        outputs: As the call would have returned them; zeros for the sessions that failed.
    """

    def __init__(self, errors: "Mapping[int, ServerError]", outputs: Any) -> None:
        first = min(errors)
        super().__init__(f"{len(errors)} sessions failed, the one at index {first} with {errors[first]}")
        self.errors = dict(errors)
        self.outputs = outputs


class ServerError(UnrollError):
    """The server refused a request, or failed on it.

    Attributes:
        code: Stable; `error.code == "position_gap"` stays true in later versions.
        status: HTTP status; 0 if the error came over a stream.
        detail: A sentence for people.
        members: Further members of the server's error document.
    """

    code: str = "unknown"
    _classes: ClassVar[dict[str, type["ServerError"]]] = {}

    def __init__(self, detail: str, code: str | None = None, status: int = 0, members: Mapping[str, Any] = {}) -> None:
        self.code = code or self.code
        super().__init__(f"{self.code}: {detail}")
        self.detail = detail
        self.status = status
        self.members = dict(members)

    def __init_subclass__(cls) -> None:
        if "code" in cls.__dict__:
            ServerError._classes[cls.code] = cls

    @property
    def retry_after(self) -> float | None:
        """Seconds after which the server may accept the request; None if it did not say."""
        seconds = self.members.get("retry_after")
        return None if seconds is None else float(seconds)

    @staticmethod
    def of(code: str, detail: str, status: int = 0, members: Mapping[str, Any] = {}) -> "ServerError":
        """The error of a code. A code that this version does not know is a plain ServerError."""
        return ServerError._classes.get(code, ServerError)(detail, code, status, members)

    @staticmethod
    def in_item(item: Mapping[str, Any]) -> "ServerError | None":
        """The error of one session in an answer about several, if it has one."""
        error = item.get("error")
        return None if error is None else ServerError.of(error["code"], error["detail"], members=error)


class Unauthenticated(ServerError):
    """The server has API keys, and the client sent none, or one that is unknown or has expired."""

    code = "unauthenticated"


class Forbidden(ServerError):
    """The client's API key does not permit this."""

    code = "forbidden"


class HostRefused(ServerError):
    """The server is not known by the host name in the URL; see its `--allowed-hosts`."""

    code = "host_refused"


class OriginRefused(ServerError):
    """Pages of this origin may not use the server; see its `--allowed-origins`."""

    code = "origin_refused"


class ModelUnknown(ServerError):
    """The server has no model of this name or version."""

    code = "model_unknown"


class ModelUnavailable(ServerError):
    """The model is in the repository and its bundle is refused; the detail says why."""

    code = "model_unavailable"


# ── the request is wrong; nothing was applied ────────────────────────────────────────────────────


class InvalidRequest(ServerError):
    """The request is not one that the server understands."""

    code = "malformed_request"


class BodyTooLarge(InvalidRequest):
    """The request exceeds `--max-body-bytes`: send fewer steps at a time."""

    code = "body_too_large"


class UnsupportedMediaType(InvalidRequest):
    """The body has a type or an encoding that the route does not take."""

    code = "unsupported_media_type"


class InvalidShape(InvalidRequest):
    """A tensor has another shape than the model's."""

    code = "invalid_shape"


class InvalidDtype(InvalidRequest):
    """A tensor has values of another type than the model's."""

    code = "invalid_dtype"


class NonFiniteInput(InvalidRequest):
    """The inputs contain NaN or infinity."""

    code = "non_finite_input"


class InputOutOfRange(InvalidRequest):
    """An input is outside the range that the model accepts, such as an index beyond its table."""

    code = "input_out_of_range"


class MapInvalid(InvalidRequest):
    """The map of a rollout does not make the model's inputs of its outputs."""

    code = "map_invalid"


class SnapshotInvalid(InvalidRequest):
    """The snapshot is damaged, or of another model."""

    code = "snapshot_invalid"


class NotStreamable(InvalidRequest):
    """The model serves whole sequences only."""

    code = "not_streamable"


class DurabilityUnavailable(InvalidRequest):
    """The server has no store, or no keys that sign client-held snapshots."""

    code = "durability_unavailable"


# ── the session; its state is as before ──────────────────────────────────────────────────────────


class SessionError(ServerError):
    """Where the session is, or what became of it."""


class SessionUnknown(SessionError):
    """The session was never opened, or was lost with its server: open one and send the steps again."""

    code = "session_unknown"


class SessionGone(SessionError):
    """The session existed and its state is lost."""


class SessionClosed(SessionGone):
    """The session was closed."""

    code = "session_closed"


class SessionExpired(SessionGone):
    """The session was idle for longer than the server's `--idle-timeout`."""

    code = "session_expired"


class SessionEvicted(SessionGone):
    """The server needed the session's room."""

    code = "session_evicted"


class SessionExists(SessionError):
    """A session of this id is open: attach to it with `mode="resume"`, or choose another id."""

    code = "session_exists"


class ModelChanged(SessionError):
    """The session runs on a version of the model that is not served any more."""

    code = "model_changed"


class PositionError(SessionError):
    """The session is not where the client expects it.

    Attributes:
        expected: The position of the step that the session would apply next.
    """

    @property
    def expected(self) -> int:
        return int(self.members["expected"])


class PositionGap(PositionError):
    """The session is behind: steps are missing. Send them again from `expected`."""

    code = "position_gap"


class PositionTooOld(PositionError):
    """The step was applied long ago, and its reply is not kept any more."""

    code = "position_too_old"


class PayloadMismatch(PositionError):
    """A step of this position was applied with other values."""

    code = "payload_mismatch"


# ── no room now; the client has retried ──────────────────────────────────────────────────────────


class Overloaded(ServerError):
    """The server has no room at present. The client has retried for `retry_for` seconds."""


class QueueFull(Overloaded):
    """Too many requests wait."""

    code = "queue_full"


class DeadlineUnreachable(Overloaded):
    """What waits takes longer than the request may wait."""

    code = "deadline_unreachable"


class TooManyConnections(Overloaded):
    """The server, or the client's address, has as many connections as it may."""

    code = "too_many_connections"


class CapacityExhausted(Overloaded):
    """No further session fits."""

    code = "capacity_exhausted"


class QuotaExceeded(Overloaded):
    """The tenant of the API key has used up what it may."""

    code = "quota_exceeded"


class Draining(Overloaded):
    """The server shuts down, and no other one answered."""

    code = "draining"


class KeysUnavailable(Overloaded):
    """The server could not verify the JWT that was sent as the API key: its identity provider has not answered."""

    code = "keys_unavailable"


class VersionUnavailable(Overloaded):
    """The session runs on a version that the server does not have yet, and no other one answered."""

    code = "version_unavailable"


class StoreUnavailable(Overloaded):
    """The server's session store does not answer. The step may have been applied: send it again."""

    code = "store_unavailable"


class SessionContended(Overloaded):
    """Other servers updated the session at the same time, again and again."""

    code = "session_contended"


# ── accepted, and failed; the state is as before ─────────────────────────────────────────────────


class ExecutionError(ServerError):
    """The request was accepted and failed."""


class Cancelled(ExecutionError):
    """The request was cancelled."""

    code = "cancelled"


class DeadlineExceeded(ExecutionError):
    """The request waited for longer than it may, for as long as the client retried."""

    code = "deadline_exceeded"


class NonFiniteOutput(ExecutionError):
    """The model answered with NaN or infinity."""

    code = "non_finite_output"


class EngineFailed(ExecutionError):
    """The model could not be run; the server's log has the reason."""

    code = "engine_failed"
