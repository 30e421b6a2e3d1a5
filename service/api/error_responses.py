"""The HTTP response of every error, also for the OpenAPI document."""

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from unroll.service.api.request import JSON, Answer
from unroll.service.api.schemas import TEXT, object_of
from unroll.service.core import errors as e
from unroll.service.protocol import json

#: What follows for the client.
_CONSEQUENCES = {
    **dict.fromkeys((409, 422, 500), "; the state is unchanged"),
    410: "; the state is lost",
    429: "; retry after Retry-After seconds",
    503: "; if there is a Retry-After, retry after that many seconds",
    504: "; nothing was run",
}

_PROBLEM = b"application/problem+json"


def problem(error: e.UnrollError) -> Answer:
    """RFC 9457 problem details with the stable `code` as an extension member."""
    answer = problem_of(error.status, error.code, error.message, error.details, _fields(error))
    answer.error = error
    return answer


def problem_responses(meanings: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """A route's problem responses by status, for the OpenAPI document."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": meaning, "content": content} for status, meaning in meanings.items()}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`problem_responses` that list the codes of each status."""
    codes = {status: ", ".join(kind.code for kind in e.with_codes() if kind.status == status) for status in statuses}
    return problem_responses({status: codes[status] + _CONSEQUENCES.get(status, "") for status in statuses})


def problem_of(status: int, code: str, detail: str, members: dict | None = None, fields: bytes = b"") -> Answer:
    document = {
        "type": f"urn:unroll:error:{code}",
        "title": code.replace("_", " "),
        "status": status,
        "detail": detail,
        "code": code,
        **(members or {}),
    }
    return Answer(status, _PROBLEM, json.dump(document), fields)


def open_inference_error(error: e.UnrollError) -> Answer:
    """The protocol's `{"error": text}`, plus the stable `code`."""
    status = 400 if isinstance(error, e.SessionUnknown) else error.status  # as Triton does
    message = error.message
    if isinstance(error, e.SessionUnknown | e.SessionGone):  # Triton's wording, which its clients parse
        message = f"{message}; must specify the START flag on the first request of the sequence"
    document = {"error": message, "code": error.code, **error.details}
    return Answer(status, JSON, json.dump(document), _fields(error), error)


def _fields(error: e.UnrollError) -> bytes:
    if isinstance(error, e.Unauthenticated):
        return b"www-authenticate: Bearer\r\n"
    return b"retry-after: %d\r\n" % math.ceil(error.retry_after) if isinstance(error, e.Overloaded) else b""


def open_inference_responses(meanings: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """`problem_responses` in the form of the Open Inference Protocol."""
    content = {"application/json": {"schema": object_of(error=TEXT, code=TEXT)}}
    return {status: {"description": meaning, "content": content} for status, meaning in meanings.items()}


def http_error(status: int, detail: str, is_v2: bool) -> Answer:
    """The response to a request that HTTP or the router refuses, in the format of the API that it addresses."""
    code = reason(status)
    return (
        Answer(status, JSON, json.dump({"error": detail, "code": code})) if is_v2 else problem_of(status, code, detail)
    )


#: Codes of statuses for which Python's phrase is unsuitable or differs between versions.
_CODES = {400: e.InvalidRequest.code, 414: "uri_too_long", 499: e.Cancelled.code}


def reason(status: int) -> str:
    """The code of a status that comes from the framework, such as `method_not_allowed`."""
    return _CODES.get(status) or HTTPStatus(status).phrase.lower().replace(" ", "_")
