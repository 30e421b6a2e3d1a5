"""Compressed request bodies: gzip and deflate."""

import zlib
from collections.abc import Callable
from functools import partial

from unroll.service.core.errors import BodyTooLarge, InvalidRequest, UnsupportedMediaType

#: Larger bodies are decompressed in a thread; zlib releases the GIL, so the event loop keeps running.
_AT_ONCE = 2**18
_GZIP, _ZLIB, _DEFLATE = 31, 15, -15  # zlib's `wbits`


def check_coding(coding: bytes) -> None:
    """Raises UnsupportedMediaType for an unsupported Content-Encoding header."""
    if coding.strip().lower() not in (b"", b"identity", b"gzip", b"x-gzip", b"deflate"):
        name = coding[:40].decode("ascii", "replace")
        raise UnsupportedMediaType(f"Content-Encoding {name!r} is not supported: use gzip, deflate or none")


def decoded(body: bytes, coding: bytes, limit: int) -> bytes | Callable[[], bytes]:
    """Decompress a body after `check_coding`, or return the call that decompresses a long one, for a thread.

    Raises:
        InvalidRequest: The body is damaged.
        BodyTooLarge: The result exceeds `limit` bytes; decompression stops there.
    """
    coding = coding.strip().lower()
    try:
        return _decompressed(body, coding, min(limit, _AT_ONCE))
    except BodyTooLarge:
        if limit <= _AT_ONCE:
            raise
    return partial(_decompressed, body, coding, limit)


def _decompressed(body: bytes, coding: bytes, limit: int) -> bytes:
    if coding in (b"", b"identity"):
        return body
    decompressor = zlib.decompressobj(_window(body) if coding == b"deflate" else _GZIP)
    try:
        content = decompressor.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not valid {coding.decode()}") from error
    if len(content) > limit:
        raise BodyTooLarge(f"the decompressed body exceeds the limit of {limit} bytes")
    if not decompressor.eof or decompressor.unused_data:
        where = "continues after the end of" if decompressor.eof else "ends before"
        raise InvalidRequest(f"the body {where} its {coding.decode()} data")
    return content


def _window(body: bytes) -> int:
    """HTTP's deflate is the zlib format, but some clients send raw deflate data without its two-byte header."""
    has_header = len(body) > 1 and body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0
    return _ZLIB if has_header else _DEFLATE
