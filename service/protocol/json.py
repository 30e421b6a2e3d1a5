"""Strict JSON: NaN and Infinity are neither accepted nor written."""

from typing import Any

import orjson

from unroll.service.core.errors import BodyTooLarge, InvalidRequest


def parse_object(body: bytes, limit: int) -> dict[str, Any]:
    """Raises InvalidRequest unless `body` is a JSON object of at most `limit` bytes."""
    if len(body) > limit:
        raise BodyTooLarge(f"a JSON body may have {limit} bytes, this one has {len(body)}; raw bytes may have more")
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
