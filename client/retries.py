"""When a request is sent again. Every step carries its position, so a repetition is never applied twice."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from unroll.client.errors import DeadlineExceeded, InvalidInput, ServerError

#: The longest timeout in seconds, about what sockets take.
_LONGEST_TIMEOUT = 1e6
#: Seconds before the first repetition; doubled for each further one, up to the longest.
_FIRST, _LONGEST = 0.05, 2.0

#: Statuses after which the same request may succeed.
RETRIED = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """For how many seconds a request is repeated, and the clock that tells, in seconds.

    Raises:
        InvalidInput: It is no number of seconds.
    """

    retry_for: float
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        if not self.retry_for >= 0:
            raise InvalidInput(f"retry_for is {self.retry_for}: give the seconds, 0 for not at all, inf for ever")


def check_timeout(timeout: float) -> float:
    """Returns it. Raises InvalidInput if it is no number of seconds that a socket can wait."""
    if not 0 < timeout <= _LONGEST_TIMEOUT:
        raise InvalidInput(f"timeout is {timeout}: give the seconds for one attempt, at most {_LONGEST_TIMEOUT:.0f}")
    return timeout


class Retries:
    """The repetitions of one request."""

    __slots__ = ("_deadline", "_policy", "count")

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._deadline: float | None = None
        self.count = 0

    def pause(self, retry_after: float | None = None) -> float | None:
        """Seconds to wait before the next repetition; None if it is time to give up."""
        now = self._policy.clock()
        if self._deadline is None:
            self._deadline = now + self._policy.retry_for
        backoff = min(_FIRST * 2**self.count, _LONGEST) * random.uniform(0.5, 1.0)  # noqa: S311 no secret
        seconds = backoff if retry_after is None else max(retry_after, 0.0) + backoff * 0.1
        self.count += 1
        return seconds if now + seconds <= self._deadline else None


def refused_for_now(error: ServerError) -> bool:
    """Whether what was asked on a stream may succeed later."""
    return error.retry_after is not None or isinstance(error, DeadlineExceeded)
