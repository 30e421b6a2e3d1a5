"""A tenant's token bucket."""

import pytest

from unroll.service.access.keys import Quota
from unroll.service.access.quotas import Meter
from unroll.service.core.errors import QuotaExceeded


def test_a_bucket_holds_a_second() -> None:
    now = [0.0]
    quotas = {"slow": Quota(steps_per_second=10), "open": Quota(sessions=1)}
    meter = Meter(quotas.get, lambda: now[0])
    for tenant in ("", "open", "unknown"):
        meter.take(tenant, 10**9)
    meter.take("slow", 4)
    meter.take("slow", 6)
    with pytest.raises(QuotaExceeded) as refused:
        meter.take("slow", 5)
    assert refused.value.retry_after == pytest.approx(0.5)
    now[0] += refused.value.retry_after
    meter.take("slow", 5)
    now[0] += 100
    meter.take("slow", 10)
    with pytest.raises(QuotaExceeded):
        meter.take("slow", 1)


def test_a_request_larger_than_a_second_is_paid_off() -> None:
    now = [0.0]
    meter = Meter({"slow": Quota(steps_per_second=10)}.get, lambda: now[0])
    meter.take("slow", 1000)
    with pytest.raises(QuotaExceeded) as refused:
        meter.take("slow", 1)
    assert refused.value.retry_after == pytest.approx(99.1)


@pytest.mark.parametrize("rate", [0.3, 7, 90])
def test_no_tenant_exceeds_its_rate(rate: float) -> None:
    now, taken = [0.0], 0
    meter = Meter({"slow": Quota(steps_per_second=rate)}.get, lambda: now[0])
    for _ in range(5000):
        now[0] += 0.01
        try:
            meter.take("slow", 1 + taken % 3)
        except QuotaExceeded:
            continue
        taken += 1 + taken % 3
    assert 0.9 * rate * 50 - 3 <= taken <= rate * 51 + 3
