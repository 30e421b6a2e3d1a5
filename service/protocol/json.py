"""Strict JSON: NaN and Infinity are neither accepted nor written."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson

from unroll.service.core.errors import BodyTooLarge, InvalidRequest

#: Values in the JSON of a request, each list and object counting as one more: a megabyte of `0,` costs as much time as
#: ten of raw bytes.
MAX_VALUES = 262_144
#: Values that are written at once.
_PIECE = 8192


def check_size(text: bytes, limit: int) -> None:
    """Raises BodyTooLarge for more than `limit` bytes, or `MAX_VALUES` values. Call it before the text is parsed."""
    if len(text) > limit:
        raise BodyTooLarge(f"a JSON body may have {limit} bytes, this one has {len(text)}; raw bytes may have more")
    if len(text) > MAX_VALUES and (values := sum(map(text.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise BodyTooLarge(
            f"a JSON body may have {MAX_VALUES} values, lists and objects, this one has {values}; send raw bytes"
        )


def parse_object(body: bytes, limit: int) -> dict[str, Any]:
    """Raises InvalidRequest unless `body` is a JSON object that `check_size` accepts."""
    check_size(body, limit)
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest("the body must be a JSON object")
    return document


def dump(document: object) -> bytes:
    """Writes arrays as nested lists; the caller guarantees that they are finite."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def dump_rows(array: np.ndarray) -> list[bytes]:
    """`dump` of each row of an array, in one call."""
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
