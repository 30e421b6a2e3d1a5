"""The address of a server, and the headers of every request."""

import http.client
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self
from urllib.parse import urlsplit

from unroll.client.errors import InvalidInput
from unroll.client.exchange import model_path


@dataclass(frozen=True)
class ServerAddress:
    """The address of a server.

    Attributes:
        url: The URL, without a trailing slash.
        host, port: The host and port in the URL.
        path: The path in the URL, a prefix of every route.
        headers: The headers of every request.
        tls: The context for https://, otherwise None.
    """

    url: str
    host: str
    port: int | None
    path: str
    headers: dict[str, str]
    tls: ssl.SSLContext | None

    @classmethod
    def of(cls, url: str, api_key: str | None, headers: Mapping[str, str] | None, tls: ssl.SSLContext | None) -> Self:
        """Parse a URL. Raises InvalidInput."""
        try:
            parts = urlsplit(url.strip().rstrip("/"))
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidInput(f"{url!r} is not a URL: {error}") from error
        if parts.scheme not in {"http", "https"} or not host or parts.query or parts.fragment:
            raise InvalidInput(f"{url!r} is not the URL of a server, such as http://127.0.0.1:8000")
        if parts.scheme == "http" and tls is not None:
            raise InvalidInput(f"{url!r} has no TLS: use https://")
        sent = dict(headers or {})
        if api_key is not None:
            sent["Authorization"] = f"Bearer {api_key}"
        if unsafe := [name for name, value in sent.items() if not _is_line(f"{name}: {value}")]:
            raise InvalidInput(f"the header {unsafe[0]!r} has a line break, or characters beyond Latin-1")
        context = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        return cls(parts.geturl(), host, port, parts.path, sent, context)

    def stream_url(self, model: str) -> str:
        """The WebSocket URL of a model, `name` or `name:version`."""
        return f"ws{self.url.removeprefix('http')}{model_path(model)}/stream"

    @cached_property
    def head(self) -> str:
        """The header lines of every request."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = {"Host": host if self.port is None else f"{host}:{self.port}", "Accept-Encoding": "identity"}
        return "".join(f"{name}: {value}\r\n" for name, value in (lines | self.headers).items())

    def connection(self, timeout: float) -> http.client.HTTPConnection:
        if self.tls is None:
            return http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        return http.client.HTTPSConnection(self.host, self.port, timeout=timeout, context=self.tls)


def _is_line(text: str) -> bool:
    return text.isprintable() and all(ord(character) < 256 for character in text)
