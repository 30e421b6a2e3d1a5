"""A request and an answer, as little of each as the inference routes need."""

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from service.core.errors import BodyTooLarge, InvalidRequest, UnsupportedMediaType

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = dict[bytes, bytes]

JSON = b"application/json"
RAW = b"application/octet-stream"


class Disconnected(Exception):
    """The client went away before its request was complete."""


@dataclass(frozen=True, slots=True)
class Request:
    """headers: by lower-case name."""

    headers: Headers
    body: bytes

    @property
    def media_type(self) -> bytes:
        return self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()

    def whole_number(self, header: bytes) -> int | None:
        """The value of a header that holds a whole number, None if it was not sent. Raises InvalidRequest."""
        text = self.headers.get(header)
        if text is None:
            return None
        if not text.isdigit() or len(text) > 18:
            raise InvalidRequest(f"the header {header.decode()} must be a whole number")
        return int(text)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    media_type: bytes
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def response(self) -> Response:
        """The same answer, for routes that FastAPI calls."""
        headers = {name.decode(): value.decode() for name, value in self.headers}
        return Response(self.body, self.status, headers, self.media_type.decode())

    async def send(self, send: Send) -> None:
        headers = [
            (b"content-type", self.media_type),
            (b"content-length", str(len(self.body)).encode()),
            *self.headers,
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


def _refuse_repeated(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Of two different positions or lengths, neither can be believed."""
    names = [name for name, _ in headers if name.startswith((b"unroll-", b"inference-", b"content-"))]
    if len(set(names)) < len(names):
        raise InvalidRequest("a header that must be there once was sent twice")


async def read_request(scope: Scope, receive: Receive, limit: int) -> Request:
    """Raises BodyTooLarge before more than `limit` bytes are held, Disconnected if the body never ends."""
    headers: Headers = dict(scope["headers"])
    if len(headers) < len(scope["headers"]):
        _refuse_repeated(scope["headers"])
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise UnsupportedMediaType("compressed bodies are not taken: send it without Content-Encoding")
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge(f"a body may have {limit} bytes, this one has {declared.decode()}")
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
            raise BodyTooLarge(f"a body may have {limit} bytes")
    return Request(headers, parts[0] if len(parts) == 1 else b"".join(parts))
