"""Every error a client can meet, each with a code that never changes.

    client ── body ──▶ protocol ── chunk ──▶ scheduler ── batch ──▶ engine
              │                    │                       │
              InvalidRequest       SessionError            ExecutionError
              (the request         (where the session is,  (it ran and failed, or
               is wrong)            or cannot be)           not be in time)
                                   Overloaded (try again later)

`api/error_responses.py` gives each its HTTP status.
"""

from typing import Any, ClassVar

#: Characters of a message: it may quote a request, which may be long.
_LONGEST_MESSAGE = 2000


class UnrollError(Exception):
    """`details` are further members of the error document, such as the expected position."""

    code: ClassVar[str]

    def __init__(self, message: str, **details: str | int | float | None) -> None:
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[:_LONGEST_MESSAGE]}…"
        super().__init__(message)
        self.message = message
        self.details = details


# ── the request may not come in; nothing of it was decoded ───────────────────────────────────────


class Unauthenticated(UnrollError):
    """It has no API key, or one that is unknown or has expired."""

    code = "unauthenticated"


class Forbidden(UnrollError):
    """Its key does not permit it."""

    code = "forbidden"


class HostRefused(UnrollError):
    """It is for a host name that this server is not known by."""

    code = "host_refused"


class OriginRefused(UnrollError):
    """A web page of another origin sent it."""

    code = "origin_refused"


# ── the request is wrong; nothing was queued ─────────────────────────────────────────────────────


class InvalidRequest(UnrollError):
    code = "malformed_request"


class BodyTooLarge(InvalidRequest):
    code = "body_too_large"


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"


class InvalidShape(InvalidRequest):
    code = "invalid_shape"


class InvalidDtype(InvalidRequest):
    code = "invalid_dtype"


class NonFiniteInput(InvalidRequest):
    code = "non_finite_input"


class OutOfRange(InvalidRequest):
    code = "input_out_of_range"


class MapInvalid(InvalidRequest):
    """The map of a rollout does not make the model's inputs of its outputs."""

    code = "map_invalid"


class SnapshotInvalid(InvalidRequest):
    code = "snapshot_invalid"


class NotStreamable(InvalidRequest):
    code = "not_streamable"


class DurabilityUnavailable(InvalidRequest):
    code = "durability_unavailable"


class ModelUnknown(UnrollError):
    code = "model_unknown"


class ModelUnavailable(UnrollError):
    """The model is in the repository, but its bundle is refused; the message says why."""

    code = "model_unavailable"


# ── where the session is, or cannot be; its state is untouched ───────────────────────────────────


class SessionError(UnrollError):
    pass


class SessionUnknown(SessionError):
    code = "session_unknown"


class SessionGone(SessionError):
    """The session was here and its state is lost for the reason the code gives."""


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
    """This process does not know the session for certain: look it up in the store, then handle the request again."""

    def __init__(self, session_id: str) -> None:
        super().__init__(session_id)
        self.session_id = session_id


# ── the server has no room now; nothing was queued ───────────────────────────────────────────────


class Overloaded(UnrollError):
    """`retry_after`: seconds after which trying again is worth it."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(Overloaded):
    """The process is about to end; others take what it does not."""

    code = "draining"


class TooManyConnections(Overloaded):
    """The process, or the client's address, has as many connections as it may."""

    code = "too_many_connections"


class QueueFull(Overloaded):
    code = "queue_full"


class DeadlineUnreachable(Overloaded):
    code = "deadline_unreachable"


class CapacityExhausted(Overloaded):
    code = "capacity_exhausted"


class QuotaExceeded(Overloaded):
    """The tenant has used up what it may; others are served."""

    code = "quota_exceeded"


class KeysUnavailable(Overloaded):
    """The key that signed a JWT is not known yet; the identity provider is being asked."""

    code = "keys_unavailable"


class VersionUnavailable(Overloaded):
    """The version of the session, or an announced one that is asked for, is not here; another replica may have it."""

    code = "version_unavailable"


# ── the store of durable sessions; whether the step was applied, its retry finds out ─────────────


class StoreUnavailable(Overloaded):
    """The store does not answer, or cannot write."""

    code = "store_unavailable"


class SessionContended(Overloaded):
    """Another replica updated the session first. The API retries on the new state before a client sees this error.

    Attributes:
        record: What the store has instead; None if it has no session, or that is not known.
    """

    code = "session_contended"
    record: Any = None


# ── it was accepted, and did not succeed; the state is as before ─────────────────────────────────


class ExecutionError(UnrollError):
    pass


class Cancelled(ExecutionError):
    code = "cancelled"


class DeadlineExceeded(ExecutionError):
    code = "deadline_exceeded"


class NonFiniteOutput(ExecutionError):
    code = "non_finite_output"


class EngineFailed(ExecutionError):
    code = "engine_failed"
