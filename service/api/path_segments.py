"""Session ids in paths: an id may be any string, and in a path it is one percent-encoded segment.

ASGI servers decode the whole path, where `%2F` becomes an ordinary slash. Therefore slashes and percent signs stay
encoded until the path is split into segments. So do line ends, because a route's pattern would match only the text
before one, and so another path than the gate has checked.
"""

from urllib.parse import quote, unquote

from starlette.convertors import Convertor, register_url_convertor
from starlette.types import ASGIApp, Receive, Scope, Send

_KEPT = str.maketrans({character: quote(character, safe="") for character in "%/\n"})


def split(path: str) -> list[str]:
    """Split an encoded path into decoded segments."""
    return [unquote(segment) for segment in path.split("/")] if "%" in path else path.split("/")


class EncodedSlashes:
    """Middleware that decodes the path except for `/`, `%` and line ends within segments."""

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
