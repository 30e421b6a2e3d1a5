"""The client's exceptions. Every error code of the server has its own class, named after the code.

UnrollError
├── InvalidInput         an array does not fit the model; nothing was sent
├── SomeFailed           some sessions of one frame failed; the steps of the rest were applied
├── ConnectionFailed     no server answered before the client gave up
└── ServerError          the server refused or failed
    ├── InvalidRequest   the request is invalid: InvalidShape, NonFiniteInput, SnapshotInvalid, …
    ├── SessionError     the session is gone or at another position: PositionGap, SessionExpired, …
    ├── Overloaded       the server had no capacity before the client gave up: QueueFull, …
    └── ExecutionError   the request was accepted and failed: DeadlineExceeded, NonFiniteOutput, …
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, ClassVar


class UnrollError(Exception):
    """The base class of the client's exceptions."""


class InvalidInput(UnrollError, ValueError):
    """An array, a name or a snapshot does not fit; nothing was sent."""


class ConnectionFailed(UnrollError, ConnectionError):
    """No server answered within `retry_for`. The last step may have been applied: send it again."""


class SomeFailed(UnrollError):
    """Steps of several sessions were sent at once, and some were refused; the rest were applied.

    Attributes:
        errors: The errors, by the session's index in the call.
        outputs: The call's outputs, with zeros for the failed sessions.
    """

    def __init__(self, errors: "Mapping[int, ServerError]", outputs: Any) -> None:
        first = min(errors)
        super().__init__(f"{len(errors)} of the sessions failed, the one at index {first} with {errors[first]}")
        self.errors = dict(errors)
        self.outputs = outputs


class ServerError(UnrollError):
    """The server refused a request, or failed on it.

    Attributes:
        code: The stable error code, such as "position_gap".
        status: The HTTP status; 0 for an error from a stream.
        detail: A human-readable explanation.
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
        """Seconds after which the server may accept the request, if it gave them."""
        seconds = self.members.get("retry_after")
        return None if seconds is None else float(seconds)

    @staticmethod
    def of(code: str, detail: str, status: int = 0, members: Mapping[str, Any] = {}) -> "ServerError":
        """Make the error for a code; a plain ServerError if this version does not know the code."""
        return ServerError._classes.get(code, ServerError)(detail, code, status, members)

    @staticmethod
    def in_item(item: Mapping[str, Any]) -> "ServerError | None":
        """The error of one session, if any, in an answer about several."""
        error = item.get("error")
        return None if error is None else ServerError.of(error["code"], error["detail"], members=error)


def quiet_after(kind: type[BaseException] | None) -> AbstractContextManager[None]:
    """Suppress the errors of a clean-up after an error of this kind, which matters more."""
    return nullcontext() if kind is None else suppress(Exception)


class Unauthenticated(ServerError):
    """The server requires an API key, and the client's is missing, unknown or expired."""

    code = "unauthenticated"


class Forbidden(ServerError):
    """The client's API key does not permit this."""

    code = "forbidden"


class HostRefused(ServerError):
    """The server does not accept the host name in the URL; see its `--allowed-hosts`."""

    code = "host_refused"


class OriginRefused(ServerError):
    """Pages from this origin may not use the server; see its `--allowed-origins`."""

    code = "origin_refused"


class ModelUnknown(ServerError):
    """The server has no model with this name or version."""

    code = "model_unknown"


class ModelUnavailable(ServerError):
    """The model is in the repository, but the server refuses its bundle; the detail says why."""

    code = "model_unavailable"


# ── the request is invalid; nothing was applied ──────────────────────────────────────────────────


class InvalidRequest(ServerError):
    """The server does not understand the request."""

    code = "malformed_request"


class BodyTooLarge(InvalidRequest):
    """The request exceeds `--max-body-bytes`: send fewer steps at a time."""

    code = "body_too_large"


class UnsupportedMediaType(InvalidRequest):
    """The route does not accept the body's type or encoding."""

    code = "unsupported_media_type"


class InvalidShape(InvalidRequest):
    """A tensor's shape differs from the model's."""

    code = "invalid_shape"


class InvalidDtype(InvalidRequest):
    """A tensor's dtype differs from the model's."""

    code = "invalid_dtype"


class NonFiniteInput(InvalidRequest):
    """The inputs contain NaN or infinity."""

    code = "non_finite_input"


class InputOutOfRange(InvalidRequest):
    """An input is outside the range that the model accepts, such as an index beyond its table."""

    code = "input_out_of_range"


class MapInvalid(InvalidRequest):
    """The map of a rollout does not turn the model's outputs into its inputs."""

    code = "map_invalid"


class SnapshotInvalid(InvalidRequest):
    """The snapshot is damaged, or belongs to another model."""

    code = "snapshot_invalid"


class NotStreamable(InvalidRequest):
    """The model serves whole sequences only."""

    code = "not_streamable"


class DurabilityUnavailable(InvalidRequest):
    """The server has no store, or no keys to sign client-held snapshots."""

    code = "durability_unavailable"


# ── the session; its state is unchanged ──────────────────────────────────────────────────────────


class SessionError(ServerError):
    """The session is gone, or not in the expected state."""


class SessionUnknown(SessionError):
    """The session was never opened, or was lost with its server: open one, and send the steps again."""

    code = "session_unknown"


class SessionGone(SessionError):
    """The session existed, but its state is lost."""


class SessionClosed(SessionGone):
    """The session was closed."""

    code = "session_closed"


class SessionExpired(SessionGone):
    """The session was idle for longer than the server's `--idle-timeout`."""

    code = "session_expired"


class SessionEvicted(SessionGone):
    """The server evicted the session to make room."""

    code = "session_evicted"


class SessionExists(SessionError):
    """A session with this id is open: attach to it with `mode="resume"`, or choose another id."""

    code = "session_exists"


class ModelChanged(SessionError):
    """The session's model version is no longer served."""

    code = "model_changed"


class PositionError(SessionError):
    """The session is not at the position that the client expects.

    Attributes:
        expected: The position of the next step.
    """

    @property
    def expected(self) -> int:
        return int(self.members["expected"])


class PositionGap(PositionError):
    """The session is behind: steps are missing. Send them again from `expected`."""

    code = "position_gap"


class PositionTooOld(PositionError):
    """The step was applied long ago, and its reply is no longer kept."""

    code = "position_too_old"


class PayloadMismatch(PositionError):
    """A step with this position was applied with different values."""

    code = "payload_mismatch"


# ── no capacity; the client has retried ──────────────────────────────────────────────────────────


class Overloaded(ServerError):
    """The server has no capacity at present. The client has retried for `retry_for` seconds."""


class QueueFull(Overloaded):
    """Too many requests are waiting."""

    code = "queue_full"


class DeadlineUnreachable(Overloaded):
    """The request would miss its deadline in the queue."""

    code = "deadline_unreachable"


class TooManyConnections(Overloaded):
    """The server, or the client's address, has reached its limit of connections."""

    code = "too_many_connections"


class CapacityExhausted(Overloaded):
    """The server has no room for another session."""

    code = "capacity_exhausted"


class QuotaExceeded(Overloaded):
    """The API key's tenant has exhausted its quota."""

    code = "quota_exceeded"


class Draining(Overloaded):
    """The server is shutting down, and no other server answered."""

    code = "draining"


class KeysUnavailable(Overloaded):
    """The server could not verify the JWT sent as the API key, because its identity provider has not answered."""

    code = "keys_unavailable"


class VersionUnavailable(Overloaded):
    """The server does not have the session's version yet, and no other server answered."""

    code = "version_unavailable"


class StoreUnavailable(Overloaded):
    """The server's session store does not answer. The step may have been applied: send it again."""

    code = "store_unavailable"


class SessionContended(Overloaded):
    """Other servers kept updating the session concurrently."""

    code = "session_contended"


# ── accepted, and failed; the state is unchanged ─────────────────────────────────────────────────


class ExecutionError(ServerError):
    """The request was accepted and failed."""


class Cancelled(ExecutionError):
    """The request was cancelled."""

    code = "cancelled"


class DeadlineExceeded(ExecutionError):
    """The request missed its deadline in the queue, on every retry."""

    code = "deadline_exceeded"


class NonFiniteOutput(ExecutionError):
    """The model's output contains NaN or infinity."""

    code = "non_finite_output"


class EngineFailed(ExecutionError):
    """Running the model failed; the server's log has the reason."""

    code = "engine_failed"
