"""The request log: one line per refused or failed request, or per request, with its session and the reason.

Session ids are private to clients, so a line has the id's digest: `printf %s ID | sha256sum | cut -c1-16`.
"""

import hashlib
import time
from collections.abc import Callable

import structlog

from unroll.service.core.choices import LogRequests

_log = structlog.get_logger(__name__)

#: Limits the lines that a flood of bad requests can cause.
LINES_PER_SECOND = 100

_LEAST_STATUS: dict[LogRequests, int] = {"none": 1000, "errors": 400, "all": 0}


class RequestLog:
    """Writes the lines. least_status: requests with a lower status are not logged."""

    def __init__(self, which: LogRequests = "errors", now: Callable[[], float] = time.monotonic) -> None:
        self.least_status = _LEAST_STATUS[which]
        self._now = now
        self._second = -1
        self._lines = 0  # lines in this second
        self._left_out = 0  # omitted lines since the last one

    def write(self, route: str, status: int, code: str | None, **fields: str | int | float | None) -> None:
        """Write a line, or omit it if this second's limit is reached. The next line reports how many were omitted.

        fields: Further fields; None is omitted. `session` is an id, and is logged as its digest.
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
