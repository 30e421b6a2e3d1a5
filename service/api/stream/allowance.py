"""Rate limits per connection for messages that cost a client nothing: pings, malformed and control messages."""

from time import monotonic

#: Per connection: rate per second, and burst.
PINGS = 50.0, 1000
ERRORS = 50.0, 1000
CONTROLS = 500.0, 2000
#: This many invalid frame entries count as one malformed message.
ENTRIES_PER_ERROR = 32
#: Maximum number of WebSocket fragments per message.
MAX_FRAGMENTS = 4096
#: Close code of a connection that exceeds a limit: RFC 6455's Policy Violation.
TOO_MUCH = 1008
#: Close code if there is no memory for a message: Try Again Later in RFC 6455's registry.
TRY_AGAIN = 1013


class Allowance:
    """A token bucket. As long as it has tokens, taking some costs only a comparison.

    Args:
        rate: Tokens added per second.
        burst: Capacity; the bucket starts full.
    """

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = self._left = burst
        self._at = monotonic()

    def take(self, amount: float = 1.0) -> float:
        """Take tokens. Returns the seconds until they will have been available; 0 if they already are."""
        self._left -= amount
        if self._left >= 0:
            return 0.0
        now = monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, -self._left / self._rate)
