"""The page at `/`. Its files are read once, and its headers restrict it to this server."""

import hashlib
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response

import unroll

_PACKAGE = Path(unroll.__file__).parent
#: Further files below `/page/`: the client library, and measurements for trying a model.
_OTHERS = (_PACKAGE / "client" / "unroll.mjs", _PACKAGE / "examples" / "co2" / "co2.csv")
_INDEX = "index.html"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
#: No inline code or styles, and no other hosts.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(self)",
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    files = {
        path.name: path.read_bytes()
        for path in (*(_PACKAGE / "service" / "page").iterdir(), *_OTHERS)
        if path.suffix in _MEDIA_TYPES and path.is_file()
    }
    tags = {name: f'"{hashlib.blake2b(content, digest_size=8).hexdigest()}"' for name, content in files.items()}
    api = APIRouter(include_in_schema=False)

    def respond(request: Request, name: str) -> Response:
        headers = {**_HEADERS, "ETag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(files[name], headers=headers, media_type=_MEDIA_TYPES[Path(name).suffix])

    @api.get("/")
    async def index(request: Request) -> Response:
        return respond(request, _INDEX)

    @api.get("/page/{name}")
    async def file(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "the page has no such file")
        return respond(request, name)

    return api
