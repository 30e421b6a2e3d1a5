"""A client of the native API in the standard library alone: one connection, kept open."""

import http.client
import json
from typing import Any, Self
from urllib.parse import quote, urlsplit

RAW = "application/octet-stream"
_TIMEOUT_SECONDS = 30


class ServerError(Exception):
    """No answer, or one that is not a success, in words for the person at the terminal."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class Client:
    """`url` is where the server is, such as `http://127.0.0.1:8000`. Raises ServerError for whatever goes wrong."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        if parts.scheme not in kinds or not parts.hostname:
            raise ServerError(f"{url!r} is no address of a server; it looks like http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self._path = parts.path.rstrip("/")
        self._connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=_TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, path: str) -> Any:
        return json.loads(self.exchange("GET", path)[0])

    def open_session(self, model: str) -> "RemoteSession":
        opened = json.loads(self.exchange("POST", f"/v1/models/{model}/sessions")[0])
        return RemoteSession(self, f"/v1/models/{model}/sessions/{quote(opened['session_id'])}")

    def sequence(self, model: str, values: bytes) -> bytes:
        """The outputs of one whole sequence, as raw little-endian values both ways."""
        return self.exchange("POST", f"/v1/models/{model}/sequences", values, {"Content-Type": RAW})[0]

    def exchange(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[bytes, http.client.HTTPMessage]:
        headers = headers or {}
        try:
            try:
                response, answer = self._ask(method, path, body, headers)
            except (ConnectionError, http.client.HTTPException):
                # The server lets go of a connection that was idle for long. What says its position, and what
                # only reads, may be sent again: a step that was applied is not applied twice.
                if method != "GET" and "Unroll-Position" not in headers:
                    raise
                self._connection.close()
                response, answer = self._ask(method, path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ServerError(f"no answer from {self.url}: {error or type(error).__name__}") from error
        if response.status >= 400:
            raise _refusal(f"{method} {path}", response.status, answer)
        return answer, response.headers

    def _ask(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        self._connection.request(method, self._path + path, body, headers)
        response = self._connection.getresponse()
        return response, response.read()


class RemoteSession:
    """A session of the server, closed on leaving it, and the position that the client knows it has reached."""

    def __init__(self, client: Client, path: str) -> None:
        self._client, self._path = client, path
        self.position = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._client.exchange("DELETE", self._path)
        except ServerError:
            if kind is None:  # else what went wrong before is what matters
                raise

    def steps(self, values: bytes, position: int | None = None) -> bytes:
        """Send T >= 1 time steps from `position` (default: where the session is). Safe to repeat: applied once."""
        start = self.position if position is None else position
        headers = {"Content-Type": RAW, "Unroll-Position": str(start)}
        outputs, answered = self._client.exchange("POST", f"{self._path}/steps", values, headers)
        self.position = int(answered["Unroll-Position"])
        return outputs


def _refusal(asked: str, status: int, answer: bytes) -> ServerError:
    try:
        problem = json.loads(answer)
        return ServerError(f"{asked}: {status} {problem['code']}: {problem['detail']}", problem["code"])
    except (ValueError, KeyError, TypeError):
        return ServerError(f"{asked}: {status} {answer[:200].decode(errors='replace')}")
