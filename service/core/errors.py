"""Every error that a client can receive, each with a code that never changes.

    client ── body ──▶ protocol ── chunk ──▶ scheduler ── batch ──▶ engine
              │                    │                       │
              InvalidRequest       SessionError            ExecutionError
              (the request         (the session's state    (it failed, or was
               is invalid)          does not permit it)     not run in time)
                                   Overloaded (retry later)

`status` is that of the HTTP response.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

#: Maximum length of a message, which may quote a long request.
_LONGEST_MESSAGE = 2000


class UnrollError(Exception):
    """details: further members of the error document, such as the expected position."""

    code: ClassVar[str]
    status: ClassVar[int]

    def __init__(self, message: str, **details: str | int | float | None) -> None:
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[:_LONGEST_MESSAGE]}…"
        super().__init__(message)
        self.message = message
        self.details = details


# ── the request is not admitted; it was not decoded ──────────────────────────────────────────────


class Unauthenticated(UnrollError):
    """The API key is missing, unknown or expired."""

    code = "unauthenticated"
    status = 401


class Forbidden(UnrollError):
    """The key lacks the required scope."""

    code = "forbidden"
    status = 403


class HostRefused(UnrollError):
    """The Host header is not a name of this server."""

    code = "host_refused"
    status = 403


class OriginRefused(UnrollError):
    """A web page of another origin sent the request."""

    code = "origin_refused"
    status = 403


# ── the request is invalid; nothing was queued ───────────────────────────────────────────────────


class InvalidRequest(UnrollError):
    code = "malformed_request"
    status = 400


class BodyTooLarge(InvalidRequest):
    code = "body_too_large"
    status = 413


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"
    status = 415


class InvalidShape(InvalidRequest):
    code = "invalid_shape"
    status = 422


class InvalidDtype(InvalidRequest):
    code = "invalid_dtype"
    status = 422


class NonFiniteInput(InvalidRequest):
    code = "non_finite_input"
    status = 422


class OutOfRange(InvalidRequest):
    code = "input_out_of_range"
    status = 422


class MapInvalid(InvalidRequest):
    """The map of a rollout cannot compute the model's inputs from its outputs."""

    code = "map_invalid"
    status = 422


class SnapshotInvalid(InvalidRequest):
    code = "snapshot_invalid"
    status = 422


class NotStreamable(InvalidRequest):
    code = "not_streamable"
    status = 422


class DurabilityUnavailable(InvalidRequest):
    code = "durability_unavailable"
    status = 422


class ModelUnknown(UnrollError):
    code = "model_unknown"
    status = 404


class ModelUnavailable(UnrollError):
    """The model is in the repository, but its bundle was refused; the message says why."""

    code = "model_unavailable"
    status = 503


# ── the session's state does not permit the request; it is unchanged ─────────────────────────────


class SessionError(UnrollError):
    status = 409


class SessionUnknown(SessionError):
    code = "session_unknown"
    status = 404


class SessionGone(SessionError):
    """The session has ended for the reason in the code."""

    status = 410


class SessionClosed(SessionGone):
    code = "session_closed"


class SessionExpired(SessionGone):
    code = "session_expired"


class SessionEvicted(SessionGone):
    code = "session_evicted"


class SessionExists(SessionError):
    code = "session_exists"


class PositionGap(SessionError):
    code = "position_gap"


class PositionTooOld(SessionError):
    code = "position_too_old"


class PayloadMismatch(SessionError):
    code = "payload_mismatch"


class ModelChanged(SessionError):
    code = "model_changed"


class NeedsStoreLookup(Exception):
    """The session must be looked up in the store, and the request handled again."""

    def __init__(self, session_id: str) -> None:
        super().__init__(session_id)
        self.session_id = session_id


# ── the server is busy; nothing was queued ───────────────────────────────────────────────────────


class Overloaded(UnrollError):
    """retry_after: seconds after which a retry may succeed."""

    status = 503

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(Overloaded):
    """The process is shutting down; another server should take the request."""

    code = "draining"


class TooManyConnections(Overloaded):
    """The process, or the client's address, has reached its limit of connections."""

    code = "too_many_connections"


class QueueFull(Overloaded):
    code = "queue_full"


class DeadlineUnreachable(Overloaded):
    code = "deadline_unreachable"


class CapacityExhausted(Overloaded):
    code = "capacity_exhausted"


class QuotaExceeded(Overloaded):
    """The tenant has reached a limit; other tenants are served."""

    code = "quota_exceeded"
    status = 429


class KeysUnavailable(Overloaded):
    """The key that signed a JWT is not known yet; the JWK set is being fetched."""

    code = "keys_unavailable"


class VersionUnavailable(Overloaded):
    """The session's version, or a requested one that is announced, is not here; another replica may have it."""

    code = "version_unavailable"


# ── the store failed; only a retry finds out whether the step was applied ────────────────────────


class StoreUnavailable(Overloaded):
    """The store does not answer, or cannot write."""

    code = "store_unavailable"


class SessionContended(Overloaded):
    """Another replica updated the session first. The API retries on the new state before a client sees this error.

    Attributes:
        record: The store's record; None if it has none, or if it is unknown.
    """

    code = "session_contended"
    record: Any = None


# ── the work was accepted but failed; the state is unchanged ─────────────────────────────────────


class ExecutionError(UnrollError):
    status = 500


class Cancelled(ExecutionError):
    code = "cancelled"
    status = 499


class DeadlineExceeded(ExecutionError):
    code = "deadline_exceeded"
    status = 504


class NonFiniteOutput(ExecutionError):
    code = "non_finite_output"
    status = 422


class EngineFailed(ExecutionError):
    code = "engine_failed"


def with_codes(base: type[UnrollError] = UnrollError) -> Iterator[type[UnrollError]]:
    """Every error with a code, in the order of this file."""
    for kind in base.__subclasses__():
        if hasattr(kind, "code"):
            yield kind
        yield from with_codes(kind)
