"""Strict JSON: NaN and Infinity are neither accepted nor written."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson

from unroll.service.core.errors import BodyTooLarge, InvalidRequest

#: Maximum number of values, lists and objects in a JSON request: a megabyte of `0,` takes as much time as ten megabytes
#: of raw bytes.
MAX_VALUES = 262_144
#: Maximum number of values per piece.
_PIECE = 8192


def check_size(text: bytes, limit: int) -> None:
    """Raises BodyTooLarge for more than `limit` bytes, or `MAX_VALUES` values. Call it before the text is parsed."""
    if len(text) > limit:
        raise BodyTooLarge(f"the JSON body has {len(text)} bytes; the limit is {limit}; raw bytes have a higher limit")
    if len(text) > MAX_VALUES and (values := sum(map(text.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise BodyTooLarge(
            f"the JSON body has {values} values, lists and objects; the limit is {MAX_VALUES}; send raw bytes"
        )


def parse_object(body: bytes, limit: int) -> dict[str, Any]:
    """Parse a JSON object. Raises InvalidRequest, also the errors of `check_size`."""
    check_size(body, limit)
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest("the body must be a JSON object")
    return document


def dump(document: object) -> bytes:
    """Serialise a document. Arrays, which must be finite, become nested lists."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def dump_rows(array: np.ndarray) -> list[bytes]:
    """`dump` each row of an array with a single call of the serialiser."""
    begin, end = b"[" * (array.ndim - 1), b"]" * (array.ndim - 1)
    rows = dump(array)[1 + len(begin) : -1 - len(end)].split(end + b"," + begin)
    return [begin + row + end for row in rows]


def pieces(document: object) -> Iterator[bytes]:
    if isinstance(document, np.ndarray) and document.size > _PIECE:
        rows = max(1, _PIECE * len(document) // document.size)
        for begin in range(0, len(document), rows):
            yield b"," if begin else b"["
            part = np.ascontiguousarray(document[begin : begin + rows])
            yield from pieces(part[0]) if rows == 1 else (dump(part)[1:-1],)
        yield b"]"
    elif isinstance(document, dict):
        for i, (name, value) in enumerate(document.items()):
            yield (b"," if i else b"{") + dump(name) + b":"
            yield from pieces(value)
        yield b"}" if document else b"{}"
    elif isinstance(document, list):
        for i, value in enumerate(document):
            yield b"," if i else b"["
            yield from pieces(value)
        yield b"]" if document else b"[]"
    else:
        yield dump(document)
