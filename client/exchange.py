"""HTTP requests and responses, without I/O.

Each operation is a generator: it yields a Request, receives the Response, and returns its result. `Client` and
`AsyncClient` only send the requests, with retries.
"""

import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

from unroll.client.errors import ModelUnavailable, ServerError
from unroll.client.retries import RETRIED

T = TypeVar("T")

JSON = "application/json"
RAW = "application/octet-stream"
EVENTS = "text/event-stream"


@dataclass(slots=True)
class Request:
    """A request; `path` is percent-encoded and relative to the server's URL."""

    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Response:
    """A response, with lower-case header names; `repeated` if its request was sent more than once."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    repeated: bool = False

    @property
    def may_succeed_later(self) -> bool:
        return self.status in RETRIED and not isinstance(self.error(), ModelUnavailable)

    @property
    def retry_after(self) -> float | None:
        try:
            return float(self.headers["retry-after"])
        except (KeyError, ValueError):  # it may be a date
            return None

    def json(self) -> Any:
        """Parse the body. Raises ServerError if it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise self.foreign() from error

    def number(self, header: str) -> int:
        """An integer header. Raises ServerError if it is missing or invalid."""
        try:
            return int(self.headers[header])
        except (KeyError, ValueError) as error:
            raise self.foreign() from error

    def foreign(self) -> ServerError:
        """The error for an answer that did not come from Unroll."""
        text = self.body[:200].decode(errors="replace").strip()
        return ServerError(
            f"this answer did not come from Unroll: {text or 'it is empty'}", "unexpected_answer", self.status
        )

    def error(self) -> ServerError | None:
        """The error that this response carries, if any."""
        if 200 <= self.status < 300:
            return None
        if self.status < 400:
            where = self.headers.get("location", "nowhere")
            return ServerError(f"redirected to {where}: use that URL", f"http_{self.status}", self.status)
        try:
            members = json.loads(self.body)
            code, detail = members["code"], members.get("detail") or members["error"]
        except (ValueError, KeyError, TypeError):  # a proxy answered
            text = self.body[:200].decode(errors="replace").strip()
            return ServerError(text or "no explanation was given", f"http_{self.status}", self.status)
        if self.retry_after is not None:
            members = {**members, "retry_after": self.retry_after}
        return ServerError.of(code, detail, self.status, members)

    def refusal(self) -> ServerError:
        """The error of a response that was not expected to succeed."""
        return self.error() or self.foreign()

    def checked(self) -> "Response":
        """Return the response. Raises ServerError if it carries an error."""
        if (error := self.error()) is not None:
            raise error
        return self


#: An operation.
Exchange = Generator[Request, Response, T]


def post_json(path: str, document: Mapping[str, Any]) -> Request:
    """A POST request with a JSON body; members that are None are omitted."""
    members = {name: value for name, value in document.items() if value is not None}
    return Request("POST", path, json.dumps(members).encode(), {"Content-Type": JSON})


def model_path(model: str) -> str:
    """The path of a model, `name` or `name:version`."""
    return f"/v1/models/{quote(model, safe=':')}"


def session_path(model: str, session_id: str) -> str:
    return f"{model_path(model)}/sessions/{quote(session_id, safe='')}"
