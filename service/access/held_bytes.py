"""What requests and answers take of the memory beside the arena: limited in all, and for each tenant."""

from collections import Counter
from collections.abc import Callable

from unroll.service.access.keys import Quota
from unroll.service.core.errors import Overloaded, QueueFull, QuotaExceeded

#: Of what: bodies of requests until they are answered, parts of a stream's messages, answers that are not read, events
#: of rollouts that are not read.
REQUESTS, MESSAGES, ANSWERS, EVENTS = KINDS = ("requests", "messages", "answers", "events")
#: Less of one connection is not counted.
SMALL = 16_384
_RETRY_SECONDS = 1.0


class HeldBytes:
    """The account.

    Attributes:
        by_kind: Bytes that are held now.
        of_tenants: The same, of each tenant that holds any.
    """

    def __init__(self, limit: int, quota_of: Callable[[str], Quota | None]) -> None:
        self._limit = limit
        self._quota_of = quota_of
        self.of_tenants: Counter[str] = Counter()
        self._total = 0
        self.by_kind = dict.fromkeys(KINDS, 0)

    def add(self, kind: str, tenant: str, size: int) -> None:
        self.by_kind[kind] += size
        self._total += size
        if tenant:
            self.of_tenants[tenant] += size
            if not self.of_tenants[tenant]:
                del self.of_tenants[tenant]

    def refusal(self, tenant: str, size: int) -> Overloaded | None:
        if self._total + size > self._limit:
            return QueueFull(
                f"requests and answers hold {self._total} bytes here, and {self._limit} are allowed "
                "(--max-held-bytes): try again",
                _RETRY_SECONDS,
            )
        quota = self._quota_of(tenant) if tenant else None
        if quota is not None and quota.bytes is not None and self.of_tenants[tenant] + size > quota.bytes:
            return QuotaExceeded(
                f"the requests and answers of the tenant {tenant!r} may hold {quota.bytes} bytes here", _RETRY_SECONDS
            )
        return None


class Holding:
    """What one connection, or one rollout, holds of a kind."""

    __slots__ = ("_account", "_kind", "_tenant", "size")

    def __init__(self, account: HeldBytes, kind: str) -> None:
        self._account = account
        self._kind = kind
        self._tenant = ""
        self.size = 0

    def resize(self, size: int, tenant: str | None = None) -> None:
        """It holds so much now, whatever the limit is. tenant: None if it is the same as before."""
        if tenant is not None and tenant != self._tenant:
            self._account.add(self._kind, self._tenant, -self.size)
            self._tenant, self.size = tenant, 0
        self._account.add(self._kind, self._tenant, size - self.size)
        self.size = size

    def grow(self, size: int, tenant: str | None = None) -> Overloaded | None:
        """It is about to hold more; returns why it may not, and then it holds as much as before."""
        if tenant is not None:
            self.resize(self.size, tenant)
        more = size - self.size
        refusal = self._account.refusal(self._tenant, more) if more > 0 else None
        if refusal is None:
            self.resize(size)
        return refusal
