"""A client for the checks, which need no package that is not Python's own. Everybody else has `unroll.Client`."""

import http.client
import json
import time
from typing import Any, Self
from urllib.parse import quote, urlsplit

RAW = "application/octet-stream"
_TIMEOUT_SECONDS = 30


class ServerError(Exception):
    """The server did not answer, or refused the request; the message is for the terminal."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class Client:
    """A connection to the server at `url`, such as `http://127.0.0.1:8000`. All failures raise ServerError."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        if parts.scheme not in kinds or not parts.hostname:
            raise ServerError(f"{url!r} is not a server URL; use one like http://127.0.0.1:8000")
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
        return RemoteSession(self, f"/v1/models/{model}/sessions/{quote(opened['session_id'], safe='')}")

    def sequence(self, model: str, values: bytes, count: int) -> bytes:
        """Run one whole sequence of `count` time steps; values and outputs are raw little-endian."""
        headers = {"Content-Type": RAW, "Unroll-Steps": str(count)}
        return self.exchange("POST", f"/v1/models/{model}/sequences", values, headers)[0]

    def exchange(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[bytes, http.client.HTTPMessage]:
        """The answer and its headers. What the server cannot do now is sent again after the time that it names."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            response, answer = self._ask_again(method, path, body, headers or {})
            pause = response.headers["Retry-After"] if response.status == 503 else None
            if pause is None or time.monotonic() > deadline:
                break
            time.sleep(float(pause))
        if response.status >= 400:
            raise _refusal(f"{method} {path}", response.status, answer)
        return answer, response.headers

    def _ask_again(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Once more if the connection was closed, as the server does with idle ones, and if that is safe.

        It is for reads and steps with a position: the server applies a step once.
        """
        try:
            try:
                return self._ask(method, path, body, headers)
            except (ConnectionError, http.client.HTTPException):
                if method != "GET" and "Unroll-Position" not in headers:
                    raise
                self._connection.close()
                return self._ask(method, path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ServerError(f"no answer from {self.url}: {str(error) or type(error).__name__}") from error

    def _ask(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        self._connection.request(method, self._path + path, body, headers)
        response = self._connection.getresponse()
        return response, response.read()


class RemoteSession:
    """A session on the server, and its position as far as the client knows. Closed on exit from `with`."""

    def __init__(self, client: Client, path: str) -> None:
        self._client, self._path = client, path
        self.position = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._client.exchange("DELETE", self._path)
        except ServerError as error:
            # session_closed: by a request whose answer was that the store does not answer
            if kind is None and error.code != "session_closed":  # otherwise the first error matters more
                raise

    def steps(self, values: bytes, count: int = 1, position: int | None = None) -> bytes:
        """Send `count` time steps from `position` (default: the current one). Safe to retry: applied once."""
        start = self.position if position is None else position
        headers = {"Content-Type": RAW, "Unroll-Position": str(start), "Unroll-Steps": str(count)}
        outputs, answered = self._client.exchange("POST", f"{self._path}/steps", values, headers)
        self.position = int(answered["Unroll-Position"])
        return outputs


def _refusal(asked: str, status: int, answer: bytes) -> ServerError:
    try:
        problem = json.loads(answer)
        return ServerError(f"{asked}: {status} {problem['code']}: {problem['detail']}", problem["code"])
    except (ValueError, KeyError, TypeError):
        return ServerError(f"{asked}: {status} {answer[:200].decode(errors='replace')}")
