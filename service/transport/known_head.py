"""Known heads: a head that a connection repeats is compared with the previous one instead of parsed."""

from typing import Self

from unroll.service.access.gate import Admission, Gate
from unroll.service.access.held_bytes import SMALL
from unroll.service.access.keys import INFER
from unroll.service.api.parameters import POSITION
from unroll.service.api.request import CONTENT_ENCODING, HEADER_LENGTH, Headers, has_fixed_length

_END = b"\r\n\r\n"
_LENGTH = b"content-length"
#: Headers whose numbers may differ between requests. Raw steps all have the same length.
_NUMBERS, _NUMBERS_OF_RAW = (POSITION, HEADER_LENGTH, _LENGTH), (POSITION,)
_MAX_DIGITS = 18
#: Longer heads are not kept.
_MOST_BYTES = 4096


class KnownHead:
    """A received head where only the digits of a position and of lengths may vary.

    headers: the headers of the last request that matched it.
    """

    __slots__ = ("_admission", "_body_bytes", "_numbers", "_rest", "headers")

    def __init__(self, head: bytes, numbers: list[tuple[slice, bytes]], headers: Headers, body_bytes: int) -> None:
        """numbers: places of digits, with their header names, in order. body_bytes: of each body; 0 if it varies."""
        self.headers = headers
        self._admission: Admission | None = None
        self._body_bytes = body_bytes
        self._numbers: list[tuple[bytes, int, bytes]] = []  # text before the digits, its size, and the header's name
        end = 0
        for place, name in numbers:
            self._numbers.append((head[end : place.start], place.start - end, name))
            end = place.stop
        self._rest = head[end:]

    @classmethod
    def of(cls, data: bytes, headers: Headers, body: bytes) -> Self | None:
        """Create it from a segment that arrived while no request was open. None unless it is one small request."""
        size = len(data) - len(body)
        if not 0 < len(body) <= SMALL or _LENGTH not in headers or CONTENT_ENCODING in headers:
            return None
        if size > _MOST_BYTES or not data.startswith(b"POST ") or data.find(_END) + len(_END) != size:
            return None
        is_raw = has_fixed_length(headers)
        lines, numbers = data[:size].lower(), []
        for name in _NUMBERS_OF_RAW if is_raw else _NUMBERS:
            if (digits := headers.get(name)) is None:
                continue
            line = lines.find(b"\r\n%b:" % name)
            begin = data.find(digits, line + len(name) + 3)
            if line < 0 or not digits.isdigit():
                return None
            numbers.append((slice(begin, begin + len(digits)), name))
        numbers.sort(key=lambda number: number[0].start)
        return cls(data[:size], numbers, headers, len(body) if is_raw else 0)

    def body_of(self, data: bytes) -> bytes | None:
        """The body, if the data is one complete request with this head. Updates `headers`.

        Call it only after the last request with this head is answered, because until then that may be handled again.
        """
        end, headers = 0, self.headers
        for before, size, name in self._numbers:
            begin = end + size
            if not data.startswith(before, end):
                return None
            end = data.find(b"\r", begin, begin + _MAX_DIGITS + 1)
            digits = headers[name] = data[begin:end]
            if end < 0 or not digits.isdigit():
                return None
        if not data.startswith(self._rest, end):
            return None
        body = data[end + len(self._rest) :]
        return body if len(body) == (self._body_bytes or int(headers[_LENGTH])) <= SMALL else None

    def admit(self, gate: Gate) -> str:
        """Admit a request with this head, as `Gate.admit`, which is asked again once keys have changed."""
        admission = self._admission
        if admission is None or admission.edition is not gate.edition:
            admission = self._admission = gate.admit_head(self.headers, INFER)
        return admission.tenant
