"""How fast each tenant may step."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from unroll.service.access.keys import Quota
from unroll.service.core.errors import QuotaExceeded


@dataclass(slots=True)
class _Bucket:
    """steps: that may be taken now; negative while a request that was larger than a second's worth is paid off."""

    steps: float
    at: float


class Meter:
    """A token bucket for each tenant that has a limit. It holds one second's worth of steps."""

    def __init__(self, quota_of: Callable[[str], Quota | None], now: Callable[[], float] = time.monotonic) -> None:
        self._quota_of = quota_of
        self._now = now
        self._buckets: dict[str, _Bucket] = {}

    def limits(self, tenant: str) -> bool:
        """Whether the tenant may take only so many steps a second."""
        quota = self._quota_of(tenant)
        return quota is not None and quota.steps_per_second is not None

    def take(self, tenant: str, steps: int) -> None:
        """Count steps that are about to be queued. A request that is larger than the bucket waits for a full one.

        Raises:
            QuotaExceeded: The tenant has taken too many lately; it may take these after `retry_after`.
        """
        if not tenant or (quota := self._quota_of(tenant)) is None or quota.steps_per_second is None:
            return
        rate, now = quota.steps_per_second, self._now()
        bucket = self._buckets.setdefault(tenant, _Bucket(rate, now))
        bucket.steps = min(rate, bucket.steps + (now - bucket.at) * rate)
        bucket.at = now
        missing = min(steps, rate) - bucket.steps
        if missing > 1e-9 * rate:
            raise QuotaExceeded(f"the tenant {tenant!r} may take {rate:g} steps a second", missing / rate)
        bucket.steps -= steps
