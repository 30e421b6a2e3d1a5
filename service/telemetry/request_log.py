"""One line for each request that is refused or fails, or for every request: for which session it was, and why.

The id of a session is the client's business, so a line has its digest: `printf %s ID | sha256sum | cut -c1-16`.
"""

import hashlib
import time
from collections.abc import Callable

import structlog

from unroll.service.core.choices import LogRequests

_log = structlog.get_logger(__name__)

#: A flood of bad requests must not become a flood of lines.
LINES_PER_SECOND = 100

_LEAST_STATUS: dict[LogRequests, int] = {"none": 1000, "errors": 400, "all": 0}


class RequestLog:
    """Writes the lines. least_status: A request with a lower status leaves none."""

    def __init__(self, which: LogRequests = "errors", now: Callable[[], float] = time.monotonic) -> None:
        self.least_status = _LEAST_STATUS[which]
        self._now = now
        self._second = -1
        self._lines = 0  # in this second
        self._left_out = 0  # since the last line

    def write(self, route: str, status: int, code: str | None, **fields: str | int | float | None) -> None:
        """Write a line, unless too many were written in this second; the next one then has their number.

        Args:
            fields: Of the line; `session` is an id, of which the line has the digest. None leaves one out.
        """
        second = int(self._now())
        if second != self._second:
            self._second, self._lines = second, 0
        if self._lines >= LINES_PER_SECOND:
            self._left_out += 1
            return
        self._lines += 1
        if (session := fields.get("session")) is not None:
            fields["session"] = digest(str(session))
        if self._left_out:
            fields["left_out"], self._left_out = self._left_out, 0
        line = {"route": route, "status": status, "code": code, **fields}
        level = _log.warning if status >= 500 else _log.info
        level("request", **{name: value for name, value in line.items() if value is not None})


def digest(session_id: str) -> str:
    return hashlib.sha256(session_id.encode(errors="replace")).hexdigest()[:16]
