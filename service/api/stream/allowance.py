"""How much of what costs a client nothing one connection may send: pings, wrong messages, control messages."""

from time import monotonic

#: Of one connection: a second, and at once after a pause.
PINGS = 50.0, 1000
ERRORS = 50.0, 1000
CONTROLS = 500.0, 2000
#: Entries of frames that are wrong in themselves, of which as many count as one wrong message.
ENTRIES_PER_ERROR = 32
#: Frames of WebSocket that one message may come in.
MAX_FRAGMENTS = 4096
#: The close code of a connection that sent more: RFC 6455's Policy Violation.
TOO_MUCH = 1008
#: Of one whose message has no room here now: RFC 6455's registry calls it Try Again Later.
TRY_AGAIN = 1013


class Allowance:
    """A token bucket. While there is something in it, taking some costs a comparison.

    Args:
        rate: what comes back in a second.
        burst: what can be there at most, as at first.
    """

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = self._left = burst
        self._at = monotonic()

    def take(self, amount: float = 1.0) -> float:
        """Take some; returns the seconds until it would have been there, 0 if it was."""
        self._left -= amount
        if self._left >= 0:
            return 0.0
        now = monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, -self._left / self._rate)
