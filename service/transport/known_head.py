"""The head that a client sends again and again on one connection: compared with the last one, not parsed."""

from typing import Self

from unroll.service.access.held_bytes import SMALL
from unroll.service.api.parameters import POSITION
from unroll.service.api.request import CONTENT_ENCODING, Headers

_END = b"\r\n\r\n"
_POSITION_LINE = b"\r\n%b:" % POSITION
_MAX_DIGITS = 18
#: A longer head is not kept.
_MOST_BYTES = 4096


class KnownHead:
    """A head as it came, in which only the digits of the position may differ, before a body of the same length.

    headers: of the last request with it.
    """

    __slots__ = ("_after", "_before", "_most_digits", "_rest", "headers")

    def __init__(self, head: bytes, position: slice, headers: Headers, body_bytes: int) -> None:
        """position: where the digits are; empty without them."""
        self.headers = headers
        self._before, self._after = head[: position.start], head[position.stop :]
        self._most_digits = _MAX_DIGITS if position.stop > position.start else 0
        self._rest = len(self._after) + body_bytes

    @classmethod
    def of(cls, data: bytes, headers: Headers, body: bytes) -> Self | None:
        """data: received at once, when no earlier request was open. None if it has more than one small request."""
        size = len(data) - len(body)
        if not 0 < len(body) <= SMALL or b"content-length" not in headers or CONTENT_ENCODING in headers:
            return None
        if size > _MOST_BYTES or not data.startswith(b"POST ") or data.find(_END) + len(_END) != size:
            return None
        position, begin = headers.get(POSITION), size
        if position is not None:
            line = data[:size].lower().find(_POSITION_LINE)
            begin = data.find(position, line + len(_POSITION_LINE))
            if line < 0 or not position.isdigit():
                return None
        return cls(data[:size], slice(begin, begin + len(position or b"")), headers, len(body))

    def body_of(self, data: bytes) -> bytes | None:
        """The body, if the data is one whole request with this head; then `headers` are its own.

        Call it only when the last request with this head is answered: until then, that one may be begun again.
        """
        begin, end = len(self._before), len(data) - self._rest
        if not data.startswith(self._before) or not begin <= end <= begin + self._most_digits:
            return None
        if self._most_digits:
            digits = data[begin:end]
            if not digits.isdigit() or not data.startswith(self._after, end):
                return None
            self.headers[POSITION] = digits
        return data[end + len(self._after) :]
