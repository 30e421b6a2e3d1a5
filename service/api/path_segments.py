"""A session id may be any string: in a path it is one segment, percent-encoded.

ASGI servers decode the whole path, in which `%2F` is then a slash like any other. So what has a meaning in a path stays
encoded until the path is split into its segments, and so does a line end: to the pattern of a route the path would end
before it, and be another than the one that the gate saw.
"""

from urllib.parse import quote, unquote

from starlette.convertors import Convertor, register_url_convertor
from starlette.types import ASGIApp, Receive, Scope, Send

_KEPT = str.maketrans({character: quote(character, safe="") for character in "%/\n"})


def split(path: str) -> list[str]:
    """Split an encoded path into decoded segments."""
    return [unquote(segment) for segment in path.split("/")] if "%" in path else path.split("/")


class EncodedSlashes:
    """Middleware: a path whose segments are decoded but for `/`, `%` and line ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and b"%" in (raw := scope.get("raw_path") or b""):
            segments = [segment.translate(_KEPT) for segment in split(raw.decode("ascii"))]
            scope = {**scope, "path": "/".join(segments)}
        await self._app(scope, receive, send)


class _Segment(Convertor[str]):
    """`{session_id:segment}` in a route's path: one segment, decoded."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return unquote(value)

    def to_string(self, value: str) -> str:
        return quote(value, safe="")


register_url_convertor("segment", _Segment())
