"""Step rate limits of tenants."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from unroll.service.access.keys import Quota
from unroll.service.core.errors import QuotaExceeded


@dataclass(slots=True)
class _Bucket:
    """steps: available steps; negative after a request for more than one second's worth."""

    steps: float
    at: float


class Meter:
    """A token bucket per tenant with a limit. It holds one second's worth of steps."""

    def __init__(self, quota_of: Callable[[str], Quota | None], now: Callable[[], float] = time.monotonic) -> None:
        self._quota_of = quota_of
        self._now = now
        self._buckets: dict[str, _Bucket] = {}

    def limits(self, tenant: str) -> bool:
        """Whether the tenant's step rate is limited."""
        quota = self._quota_of(tenant)
        return quota is not None and quota.steps_per_second is not None

    def take(self, tenant: str, steps: int) -> None:
        """Take steps that are about to be queued. A request larger than the bucket needs a full bucket.

        Raises:
            QuotaExceeded: The tenant has exceeded its rate; `retry_after` is when it may take these steps.
        """
        if not tenant or (quota := self._quota_of(tenant)) is None or quota.steps_per_second is None:
            return
        rate, now = quota.steps_per_second, self._now()
        bucket = self._buckets.setdefault(tenant, _Bucket(rate, now))
        bucket.steps = min(rate, bucket.steps + (now - bucket.at) * rate)
        bucket.at = now
        missing = min(steps, rate) - bucket.steps
        if missing > 1e-9 * rate:
            raise QuotaExceeded(f"tenant {tenant!r} exceeds its limit of {rate:g} steps per second", missing / rate)
        bucket.steps -= steps
