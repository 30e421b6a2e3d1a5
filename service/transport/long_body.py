"""Long bodies: decompressed in a thread, and parsed and converted in separate turns of the event loop."""

import asyncio
from collections.abc import Callable

from unroll.service.api.app_state import ApiLimits
from unroll.service.api.content_coding import decoded
from unroll.service.api.request import CONTENT_ENCODING, HEADER_LENGTH, RAW, Request
from unroll.service.core.errors import UnrollError
from unroll.service.core.turns import Turns
from unroll.service.protocol import json


class LongBody:
    """Reads the long bodies of one connection, one at a time.

    Args:
        is_lost: Whether the connection is closing.
        hold: Reserves held bytes; returns an error if there are too many.
        handle: Called when the request can be handled.
        fail: Called with an error instead.
    """

    def __init__(
        self,
        turns: Turns,
        limits: ApiLimits,
        is_lost: Callable[[], bool],
        hold: Callable[[int], UnrollError | None],
        handle: Callable[[], None],
        fail: Callable[[UnrollError], None],
    ) -> None:
        self._turns, self._limits = turns, limits
        self._is_lost, self._hold = is_lost, hold
        self._handle, self._fail = handle, fail

    def read(self, request: Request, takes_document: bool) -> None:
        """Parse JSON in one turn and convert it to arrays in the next; convert other bodies in the first."""
        is_json = takes_document and request.media_type != RAW and HEADER_LENGTH not in request.headers
        self._turns.call(lambda: (self._parse if is_json else self._finish)(request))

    def decode(self, request: Request, takes_document: bool) -> None:
        coding, limit = request.headers[CONTENT_ENCODING], self._limits.max_body_bytes
        try:
            made = decoded(request.body, coding, limit)
        except UnrollError as error:
            self._fail(error)
            return
        if isinstance(made, bytes):
            request.body = made
            self._handle()
        else:
            body = asyncio.get_running_loop().run_in_executor(None, made)
            request.cancel = body.cancel
            body.add_done_callback(lambda body: self._take_decoded(request, body, takes_document))

    def _take_decoded(self, request: Request, body: asyncio.Future[bytes], takes_document: bool) -> None:
        if body.cancelled() or self._is_lost():
            return
        if isinstance(error := body.exception(), UnrollError):
            self._fail(error)
            return
        request.body = body.result()
        if (error := self._hold(len(request.body))) is not None:
            self._fail(error)
        else:
            self.read(request, takes_document)

    def _parse(self, request: Request) -> None:
        if self._is_lost():
            return
        try:
            request.document = json.parse_object(request.body, self._limits.max_json_bytes)
        except UnrollError as error:
            self._fail(error)
        else:
            self._turns.call(lambda: self._finish(request), first=True)  # frees the parsed document, which is large

    def _finish(self, request: Request) -> None:
        if not self._is_lost():
            self._handle()
        request.document = None
