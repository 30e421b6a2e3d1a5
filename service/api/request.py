"""Minimal request and answer types for the inference routes."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Generic, TypeVar

import structlog
from starlette.responses import Response

from unroll.service.api.content_coding import check_coding, decoded
from unroll.service.core.errors import (
    BodyTooLarge,
    EngineFailed,
    InvalidRequest,
    SessionContended,
    UnrollError,
)
from unroll.service.core.session_ids import owned
from unroll.service.core.turns import SLICE_SECONDS
from unroll.service.engine.engine import Tensors
from unroll.service.protocol import json
from unroll.service.protocol.open_inference import RepeatedText
from unroll.service.protocol.tensors import Codec

_log = structlog.get_logger(__name__)

C = TypeVar("C")
T = TypeVar("T")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Headers = dict[bytes, bytes]

JSON = b"application/json"
RAW = b"application/octet-stream"
CONTENT_ENCODING = b"content-encoding"
HEADER_LENGTH = b"inference-header-content-length"
#: Key in an ASGI scope: the tenant of an admitted request.
TENANT = "unroll.tenant"
#: Key in an ASGI scope: the lock that admits one long decompressed body at a time, because these are not held bytes.
LONG_BODIES = "unroll.long_bodies"

#: Header of a reply that was too large to keep, so that a retry of its chunk is refused.
NOT_KEPT = b"unroll-reply-kept: false\r\n"

#: Answers with more values are encoded in turns of the event loop of their own.
_MOST_AT_ONCE = 32_768

#: Maximum digits of a number in a header; every such number fits in 64 bits.
_MAX_DIGITS = 18


def has_fixed_length(headers: Headers) -> bool:
    """Whether all requests that repeat these headers have bodies of the same length, as raw steps do."""
    return headers.get(b"content-type") == RAW and HEADER_LENGTH not in headers


class Disconnected(Exception):
    """The client disconnected before its request was complete."""


class Request:
    """A request of an inference route.

    Attributes:
        headers: By lower-case name.
        document: The parsed body, if it is long JSON that was parsed early.
        tenant: The tenant; empty without keys.
        session, position: Id of the session and the specified position, if any, for the log.
        again: Handles the request again after another replica updated its session; None without a store.
        cancel: Cancels the work.
        repeat: Handles the next request with the same headers, except for numbers; see `repeated_steps.py`.
        text: The text that such requests repeat, if the connection can have any.
    """

    __slots__ = ("again", "body", "cancel", "document", "headers", "position", "repeat", "session", "tenant", "text")

    def __init__(self, headers: Headers, body: bytes, tenant: str = "") -> None:
        self.headers = headers
        self.body = body
        self.document: dict[str, Any] | None = None
        self.tenant = tenant
        self.again: Callable[[], bool] | None = None
        self.cancel: Cancel = nothing_to_cancel
        self.repeat: Callable[[Request, Respond], Cancel | None] | None = None
        self.text: RepeatedText | None = None
        self.session: str | None = None
        self.position: int | None = None

    def own(self, session_id: str) -> str:
        """The server's internal id for the client's session id. Raises InvalidRequest."""
        return owned(self.tenant, session_id)

    @property
    def media_type(self) -> bytes:
        sent = self.headers.get(b"content-type", b"")
        return sent if sent in (JSON, RAW) else sent.partition(b";")[0].strip().lower()

    def whole_number(self, header: bytes) -> int | None:
        """The value of a header that is a whole number; None if it is absent. Raises InvalidRequest."""
        text = self.headers.get(header)
        if text is None:
            return None
        if not text.isdigit() or len(text) > _MAX_DIGITS:
            raise InvalidRequest(f"the header {header.decode()} must be a whole number")
        return int(text)


@dataclass(slots=True)
class Answer:
    """The answer to a request.

    Attributes:
        fields: Further header lines, each ending in CR LF. They never contain client data.
        error: The error, if this is one, for the log.
        pieces: Content that is not encoded yet; it precedes `body`.
    """

    status: int
    media_type: bytes
    body: bytes
    fields: bytes = b""
    error: UnrollError | None = None
    pieces: Iterator[bytes] | None = None
    _encoded: list[bytes] = field(default_factory=list)

    def encode_slice(self) -> None:
        """Encode some of the pieces. `pieces` is None after the last."""
        assert self.pieces is not None
        until = perf_counter() + SLICE_SECONDS
        for piece in self.pieces:
            self._encoded.append(piece)
            if perf_counter() > until:
                return
        self.put_first(b"".join(self._encoded))
        self.pieces = None
        self._encoded.clear()

    def put_first(self, text: bytes) -> None:
        """Prepend JSON to the body, which contains tensors or nothing."""
        if self.body:
            self.fields += b"inference-header-content-length: %d\r\n" % len(text)
        self.body = text + self.body

    def response(self) -> Response:
        headers = dict(line.split(": ", 1) for line in self.fields.decode().splitlines())
        return Response(self.body, self.status, headers, self.media_type.decode())


def json_answer(document: dict[str, Any], values: int, fields: bytes = b"", tensors: bytes = b"") -> Answer:
    """A JSON answer. values: number of values in its arrays. tensors: binary data that follows the JSON."""
    answer = Answer(200, RAW if tensors else JSON, tensors, fields)
    if values > _MOST_AT_ONCE:
        answer.pieces = json.pieces(document)
    else:
        answer.put_first(json.dump(document))
    return answer


def raw_answer(codec: Codec, outputs: Tensors, fields: bytes = b"") -> Answer:
    """An answer of raw bytes."""
    if sum([array.size for array in outputs]) > _MOST_AT_ONCE:
        return Answer(200, RAW, b"", fields, pieces=iter(map(codec.to_raw, [outputs])))
    return Answer(200, RAW, codec.to_raw(outputs), fields)


#: Called once with the answer to a request.
Respond = Callable[[Answer], None]
#: Cancels the work on a request after its client disconnected.
Cancel = Callable[[], object]


def nothing_to_cancel() -> None:
    """The `Cancel` of a request that was answered immediately."""


@dataclass(slots=True, eq=False)
class Answering(Generic[C, T]):
    """Answers a request with the outcome that the scheduler passes to it. Never raises.

    again: handles the request again if another replica updated its session; returns False after too many attempts.
    """

    respond: Respond
    failure: Callable[[UnrollError], Answer]
    encode: Callable[[C, T], Answer]
    context: C
    again: Callable[[], bool] | None = None

    def __call__(self, outcome: T | UnrollError) -> None:
        if isinstance(outcome, UnrollError):
            if isinstance(outcome, SessionContended) and self.again is not None and self.again():
                return
            answer = self.failure(outcome)
        else:
            try:
                answer = self.encode(self.context, outcome)
            except Exception as error:  # noqa: BLE001 the loop that calls this serves all clients
                _log.error("reply not encoded", exc_info=error)
                answer = self.failure(EngineFailed("the reply could not be encoded; the server's log has the reason"))
        self.respond(answer)


async def answered(begin: Callable[[Respond], Cancel]) -> Answer:
    """Await the answer to the work that `begin` starts; cancelling the caller cancels the work."""
    future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    cancel = begin(lambda answer: None if future.done() else future.set_result(answer))
    try:
        return await future
    except asyncio.CancelledError:
        cancel()
        raise


def _refuse_repeated(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Raises InvalidRequest for a repeated position or length, which would be ambiguous."""
    names = [name for name, _ in headers if name.startswith((b"unroll-", b"inference-", b"content-"))]
    if len(set(names)) < len(names):
        raise InvalidRequest("a header that may occur only once was repeated")


def check_headers(fields: Sequence[tuple[bytes, bytes]], headers: Headers, limit: int) -> None:
    """Raises InvalidRequest, UnsupportedMediaType, or BodyTooLarge for a body declared longer than `limit`.

    Args:
        fields: The header fields as received, with lower-case names.
        headers: The same fields by name.
        limit: Maximum size of a body in bytes.
    """
    if len(headers) < len(fields):
        _refuse_repeated(fields)
    if (coding := headers.get(CONTENT_ENCODING)) is not None:
        check_coding(coding)
    declared = _declared_length(headers)
    if declared is not None and declared > limit:
        raise BodyTooLarge(f"the body has {declared} bytes; the limit is {limit}")


def _declared_length(headers: Headers) -> int | None:
    declared = headers.get(b"content-length")
    if declared is None:
        return None
    if not declared.isdigit() or len(declared) > _MAX_DIGITS:
        raise InvalidRequest(f"Content-Length must be a whole number of at most {_MAX_DIGITS} digits")
    return int(declared)


async def read_request(scope: Scope, receive: Receive, limit: int) -> Request:
    """Read the body. Raises BodyTooLarge beyond `limit` bytes, and Disconnected if the client disconnects first."""
    headers: Headers = dict(scope["headers"])
    check_headers(scope["headers"], headers, limit)
    parts: list[bytes] = []
    room, more = limit, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
        room -= len(parts[-1])
        if room < 0:
            raise BodyTooLarge(f"the body exceeds the limit of {limit} bytes")
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    declared = _declared_length(headers)
    if declared is not None and declared != len(body):
        raise InvalidRequest(f"Content-Length announced {declared} bytes, and the body has {len(body)}")
    if (coding := headers.get(CONTENT_ENCODING)) is not None:
        made = decoded(body, coding, limit)
        if isinstance(made, bytes):
            body = made
        else:
            async with scope[LONG_BODIES]:  # the caller parses it before another task can run
                body = await asyncio.to_thread(made)
    return Request(headers, body, scope.get(TENANT, ""))
