"""A request and its answer, with no more than the inference routes need."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
from unroll.service.protocol import json
from unroll.service.protocol.open_inference import RepeatedText

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
#: Member of an ASGI scope: the tenant of a request that was let in.
TENANT = "unroll.tenant"

#: The header line of a reply that was too large to keep: a retry of its chunk is refused.
NOT_KEPT = b"unroll-reply-kept: false\r\n"

#: Values of an answer in JSON that are encoded at once. More take several turns of the event loop, so long in each.
_MOST_AT_ONCE = 32_768
_SLICE_SECONDS = 0.001

#: Of a number in a header: every such number fits into 64 bits.
_MAX_DIGITS = 18


def has_fixed_length(headers: Headers) -> bool:
    """Are all bodies behind a head with these headers as long as the first? Of other heads, the length may differ."""
    return headers.get(b"content-type") == RAW and HEADER_LENGTH not in headers


class Disconnected(Exception):
    """The client went away before its request was complete."""


class Request:
    """A request of an inference route.

    Attributes:
        headers: By lower-case name.
        document: A long body in JSON, if it is parsed already.
        tenant: Whose it is; empty without keys.
        session: The id of its session, if it has one. position: Where the client expects it. Both are for the log.
        again: Looks a session up in the store and handles the request again; None without a store.
        cancel: Cancels the work on it.
        repeats: Its head is kept: the next request of its connection may have the same, but for numbers.
        repeat: Begins such a request; see `repeated_steps.py`.
        text: The text of the last small request of the Open Inference Protocol on its connection.
    """

    __slots__ = (
        "again",
        "body",
        "cancel",
        "document",
        "headers",
        "position",
        "repeat",
        "repeats",
        "session",
        "tenant",
        "text",
    )

    def __init__(self, headers: Headers, body: bytes, tenant: str = "") -> None:
        self.headers = headers
        self.body = body
        self.document: dict[str, Any] | None = None
        self.tenant = tenant
        self.again: Callable[[str], bool] | None = None
        self.cancel: Cancel = nothing_to_cancel
        self.repeats = False
        self.repeat: Callable[[Request, Respond], Cancel | None] | None = None
        self.text: RepeatedText | None = None
        self.session: str | None = None
        self.position: int | None = None

    def own(self, session_id: str) -> str:
        """The id inside the server of a session that the client names. Raises InvalidRequest."""
        return owned(self.tenant, session_id)

    def again_with(self, session_id: str) -> Callable[[], bool] | None:
        return None if self.again is None else partial(self.again, session_id)

    @property
    def media_type(self) -> bytes:
        sent = self.headers.get(b"content-type", b"")
        return sent if sent in (JSON, RAW) else sent.partition(b";")[0].strip().lower()

    def whole_number(self, header: bytes) -> int | None:
        """The value of a header that holds a whole number, None if it was not sent. Raises InvalidRequest."""
        text = self.headers.get(header)
        if text is None:
            return None
        if not text.isdigit() or len(text) > _MAX_DIGITS:
            raise InvalidRequest(f"the header {header.decode()} must be a whole number")
        return int(text)


@dataclass(slots=True)
class Answer:
    """fields: further header lines, each ended by CR LF; names and values are ours, never a client's.

    error: what the request was answered with, for the log. pieces: JSON that is not encoded yet, and precedes `body`.
    """

    status: int
    media_type: bytes
    body: bytes
    fields: bytes = b""
    error: UnrollError | None = None
    pieces: Iterator[bytes] | None = None
    _encoded: list[bytes] = field(default_factory=list)

    def encode_slice(self) -> None:
        """Encode some of the pieces; they are None after the last."""
        assert self.pieces is not None
        until = perf_counter() + _SLICE_SECONDS
        for piece in self.pieces:
            self._encoded.append(piece)
            if perf_counter() > until:
                return
        self.put_first(b"".join(self._encoded))
        self.pieces = None
        self._encoded.clear()

    def put_first(self, text: bytes) -> None:
        """Put JSON before the tensors, if there are any."""
        if self.body:
            self.fields += b"inference-header-content-length: %d\r\n" % len(text)
        self.body = text + self.body

    def response(self) -> Response:
        headers = dict(line.split(": ", 1) for line in self.fields.decode().splitlines())
        return Response(self.body, self.status, headers, self.media_type.decode())


def json_answer(document: dict[str, Any], values: int, fields: bytes = b"", tensors: bytes = b"") -> Answer:
    """values: in the arrays of the document. tensors: that follow it."""
    answer = Answer(200, RAW if tensors else JSON, tensors, fields)
    if values > _MOST_AT_ONCE:
        answer.pieces = json.pieces(document)
    else:
        answer.put_first(json.dump(document))
    return answer


#: Takes the answer to a request, once.
Respond = Callable[[Answer], None]
#: Cancels the work on a request whose client disconnected.
Cancel = Callable[[], object]


def nothing_to_cancel() -> None:
    """The request was answered at once."""


@dataclass(slots=True, eq=False)
class Answering(Generic[C, T]):
    """Called by the scheduler with the outcome of a request's work; answers the request, and never raises.

    again: handles the request again if another replica updated its session; returns False if it gave up.
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
    """The answer to what `begin` begins; cancelling the caller cancels it."""
    future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    cancel = begin(lambda answer: None if future.done() else future.set_result(answer))
    try:
        return await future
    except asyncio.CancelledError:
        cancel()
        raise


def _refuse_repeated(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Of two different positions or lengths, neither can be believed."""
    names = [name for name, _ in headers if name.startswith((b"unroll-", b"inference-", b"content-"))]
    if len(set(names)) < len(names):
        raise InvalidRequest("a header that is allowed once was sent twice")


def check_headers(fields: Sequence[tuple[bytes, bytes]], headers: Headers, limit: int) -> None:
    """Raises InvalidRequest, UnsupportedMediaType, or BodyTooLarge for a body declared longer than `limit`.

    Args:
        fields: As received; names are lower case.
        headers: The same by name.
        limit: Bytes that a body may have.
    """
    if len(headers) < len(fields):
        _refuse_repeated(fields)
    if (coding := headers.get(CONTENT_ENCODING)) is not None:
        check_coding(coding)
    declared = _declared_length(headers)
    if declared is not None and declared > limit:
        raise BodyTooLarge(f"the body has {declared} bytes, and the limit is {limit}")


def _declared_length(headers: Headers) -> int | None:
    declared = headers.get(b"content-length")
    if declared is None:
        return None
    if not declared.isdigit() or len(declared) > _MAX_DIGITS:
        raise InvalidRequest(f"Content-Length must be a whole number of at most {_MAX_DIGITS} digits")
    return int(declared)


async def read_request(scope: Scope, receive: Receive, limit: int) -> Request:
    """Raises BodyTooLarge before more than `limit` bytes are held, Disconnected if the body never ends."""
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
        body = made if isinstance(made, bytes) else await made
    return Request(headers, body, scope.get(TENANT, ""))
