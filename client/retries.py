"""When to retry a request. Every step carries its position, so a retry is never applied twice."""

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from unroll.client.errors import ConnectionFailed, DeadlineExceeded, InvalidInput, ServerError

#: The longest timeout in seconds, close to the limit of sockets.
_LONGEST_TIMEOUT = 1e6
#: Failed attempts until a request that is still retried leaves a warning, after about a second.
_WARN_AFTER = 5
#: Seconds before the first retry, doubled for each further one; and the longest pause.
_FIRST, _LONGEST = 0.05, 2.0

#: Statuses after which a retry may succeed.
RETRIED = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)


_log = logging.getLogger("unroll.client")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The server's URL, how long to retry a request, and the clock, both in seconds.

    Raises:
        InvalidInput: `retry_for` is negative or NaN.
    """

    url: str
    retry_for: float
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        if not self.retry_for >= 0:
            raise InvalidInput(f"retry_for is {self.retry_for}: give seconds, 0 for no retries, or inf for ever")


def check_timeout(timeout: float) -> float:
    """Return the timeout. Raises InvalidInput if a socket cannot wait that long."""
    if not 0 < timeout <= _LONGEST_TIMEOUT:
        raise InvalidInput(f"timeout is {timeout}: give the seconds for one attempt, at most {_LONGEST_TIMEOUT:.0f}")
    return timeout


class Retries:
    """The retries of one request."""

    __slots__ = ("_deadline", "_policy", "count")

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._deadline: float | None = None
        self.count = 0

    def reconnect(self, error: Exception, retry_after: float | None = None) -> float:
        """Seconds until a broken connection is replaced. Raises ConnectionFailed: a retry is useless, or time is up."""
        reason = str(error) or type(error).__name__
        pause = self.pause(retry_after, reason)
        if pause is None or isinstance(error, ValueError):  # as an error about the server's certificate is
            raise ConnectionFailed(f"{self._policy.url} did not answer (attempts: {self.count}): {reason}") from error
        return pause

    def pause(self, retry_after: float | None = None, reason: str = "refused for now") -> float | None:
        """Seconds to wait before the next retry; None if it is time to give up."""
        now = self._policy.clock()
        if self._deadline is None:
            self._deadline = now + self._policy.retry_for
        backoff = min(_FIRST * 2**self.count, _LONGEST) * random.uniform(0.5, 1.0)  # noqa: S311 no secret
        seconds = backoff if retry_after is None else max(retry_after, 0.0) + backoff * 0.1
        self.count += 1
        if self.count == _WARN_AFTER and now + seconds <= self._deadline:
            url, longest = self._policy.url, self._policy.retry_for
            _log.warning("%s: %d attempts failed (%s); retrying for %g s", url, self.count, reason, longest)
        return seconds if now + seconds <= self._deadline else None


def refused_for_now(error: ServerError) -> bool:
    """May a request that was refused on a stream succeed later?"""
    return error.retry_after is not None or isinstance(error, DeadlineExceeded)
