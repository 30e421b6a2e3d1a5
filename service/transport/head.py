"""Validates a request's head by RFC 9110 and 9112, beyond its syntax."""

import functools
import re
from collections.abc import Sequence
from urllib.parse import unquote_to_bytes

import httptools
import structlog

from unroll.service.api.error_responses import http_error, open_inference_error, problem
from unroll.service.api.request import Answer, Headers
from unroll.service.core.errors import UnrollError

_log = structlog.get_logger(__name__)

Fields = Sequence[tuple[bytes, bytes]]

MAX_URL_BYTES = 8192
MAX_FIELDS = 100
MAX_FIELD_BYTES = 16_384

#: RFC 3986: a name or an address, and an optional port.
_HOST = re.compile(rb"([\w.~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?", re.ASCII)


class Refused(Exception):
    """The request is answered with this status, and the connection is closed. error: replaces the status's code."""

    def __init__(self, status: int, detail: str, error: UnrollError | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.error = error

    def answer(self, *, is_v2: bool) -> Answer:
        if self.error is None:
            return http_error(self.status, self.detail, is_v2)
        return (open_inference_error if is_v2 else problem)(self.error)


def check_head(version: str, fields: Fields) -> Headers:
    """Return the header fields by name. Raises Refused.

    Args:
        version: For example `1.1`.
        fields: Header fields with lower-case names.
    """
    headers: Headers = dict(fields)
    if version not in ("1.1", "1.0"):
        raise Refused(505, f"HTTP/{version} is not supported: use HTTP/1.1")
    if len(headers) < len(fields):
        _check_repeated(fields)
    host = headers.get(b"host")
    if host is None:
        if version == "1.1":
            raise Refused(400, "the header Host is missing")
    elif not _is_host(host):
        raise Refused(400, "the header Host is not a host name with an optional port")
    coding = headers.get(b"transfer-encoding")
    if coding is not None:
        _check_coding(coding, version)
    if headers.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise Refused(417, "the only supported expectation is 100-continue")
    return headers


def check_url(url: bytes) -> None:
    """Raises Refused for a path that does not decode to UTF-8, since several such paths could name one session."""
    try:
        unquote_to_bytes(url.partition(b"?")[0]).decode()
    except UnicodeDecodeError:
        raise Refused(400, "the percent-encoded path must be UTF-8") from None


def check_size(fields: Fields, limit: int) -> None:
    """Raises Refused if names and values exceed `limit` bytes in total."""
    size = sum(len(name) + len(value) for name, value in fields)
    if size > limit:
        raise too_many_header_bytes(limit)


def too_many_header_bytes(limit: int) -> Refused:
    return Refused(431, f"the headers exceed the limit of {limit} bytes: see --max-header-bytes")


def _check_repeated(fields: Fields) -> None:
    names = [name for name, _ in fields]
    for name in (b"host", b"transfer-encoding", b"expect", b"authorization", b"x-api-key", b"origin"):
        if names.count(name) > 1:
            raise Refused(400, f"the header {name.decode().title()} was repeated")


def _check_coding(coding: bytes, version: str) -> None:
    if version == "1.0":
        raise Refused(400, "HTTP/1.0 has no Transfer-Encoding")
    if coding.lower() != b"chunked":
        raise Refused(501, "the only supported transfer coding is chunked")


@functools.lru_cache(64)
def _is_host(value: bytes) -> bool:
    return _HOST.fullmatch(value) is not None


def offers_stream(method: bytes, version: str, headers: Headers) -> bool:
    """Whether an upgrade request is for a WebSocket, as RFC 6455 requires."""
    has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0").strip(b"0")
    return (
        (method, version) == (b"GET", "1.1")
        and headers[b"upgrade"].lower() == b"websocket"
        and headers.get(b"sec-websocket-version") == b"13"
        and not has_body
    )


def without_offer(method: bytes, version: str, url: bytes, fields: Fields) -> bytes:
    """The head without its upgrade, which the server declines (RFC 9110, 7.8)."""
    lines = [b"%b %b HTTP/%b" % (method, url, version.encode())]
    for name, value in fields:
        if name == b"connection":
            kept = [option for option in value.split(b",") if option.strip().lower() != b"upgrade"]
            value = b",".join(kept)
        if name != b"upgrade":
            lines.append(b"%b: %b" % (name, value))
    return b"\r\n".join([*lines, b"\r\n"])


def refusal_of(error: httptools.HttpParserError) -> Refused:
    """The answer to a request that the parser or a callback rejected."""
    cause = error.__context__
    if isinstance(cause, Refused):
        return cause
    if isinstance(error, httptools.HttpParserInvalidMethodError):
        return Refused(501, "the method is invalid or not supported")
    if isinstance(cause, httptools.HttpParserInvalidURLError):
        return Refused(400, "the URL is not valid")
    if cause is not None:
        _log.error("unexpected error", exc_info=cause)
        return Refused(500, "the server failed on this request; its log has the reason")
    return Refused(400, f"this is not an HTTP/1.1 request: {error}")
