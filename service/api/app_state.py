"""The state shared by all routes: models, sessions, limits, figures."""

from dataclasses import dataclass, field
from typing import Protocol

from unroll.service.access.gate import Gate
from unroll.service.access.held_bytes import HeldBytes
from unroll.service.access.quotas import Meter
from unroll.service.api.all_workers import AllWorkers
from unroll.service.core.errors import Draining, DurabilityUnavailable, QuotaExceeded
from unroll.service.core.turns import Turns
from unroll.service.models.repository import ModelRepository
from unroll.service.models.versions import ModelVersions
from unroll.service.sessions.in_memory import MemorySessions
from unroll.service.state.sealed_snapshot import SnapshotKeys
from unroll.service.telemetry.metrics import ConnectionFigures, RequestFigures
from unroll.service.telemetry.request_log import RequestLog


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """request_timeout: seconds within which a request must start to run, unless it specifies its own."""

    request_timeout: float = 30.0
    max_body_bytes: int = 16 * 2**20
    max_json_bytes: int = 2 * 2**20
    max_rollout_steps: int = 4096
    max_held_bytes: int = 512 * 2**20


class Drainable(Protocol):
    tenant: str

    def drain(self) -> None:
        """Shut down gracefully."""


@dataclass(slots=True)
class AppState:
    """The state shared by all routes.

    Attributes:
        sessions: Finds sessions and runs their operations other than steps.
        durability: Default durability of new sessions.
        snapshot_keys: Sign the snapshots that clients hold; None: durability `client` is unavailable.
        workers: All worker processes; None with a single process.
        requests: Figures by inference route.
        ready: Every model is loaded, its loop is running, and the store, if any, has answered once.
        draining: The process is shutting down: it finishes its work and opens no sessions.
        crashed: A loop ended with an error, and the process is shutting down because of it.
        failed: The shutdown failed in part, for example sessions were lost.
    """

    models: ModelVersions
    repository: ModelRepository
    sessions: MemorySessions
    limits: ApiLimits
    durability: str = "memory"
    snapshot_keys: SnapshotKeys | None = None
    workers: AllWorkers | None = None
    gate: Gate = field(default_factory=Gate)
    meter: Meter = field(init=False)
    held: HeldBytes = field(init=False)
    request_log: RequestLog = field(default_factory=RequestLog)
    turns: Turns = field(default_factory=Turns)
    requests: dict[str, RequestFigures] = field(default_factory=dict)
    connections: ConnectionFigures = field(default_factory=ConnectionFigures)
    streams: set[Drainable] = field(default_factory=set)
    ready: bool = False
    draining: bool = False
    crashed: bool = False
    failed: bool = False

    def __post_init__(self) -> None:
        self.meter = Meter(self.gate.quota)
        self.held = HeldBytes(self.limits.max_held_bytes, self.gate.quota)

    @property
    def in_flight(self) -> int:
        """Chunks of all models that are accepted and not yet answered."""
        return sum(model.scheduler.in_flight for model in self.models)

    def drain(self) -> None:
        """Become not ready, and refuse new sessions and streams."""
        self.ready, self.draining = False, True

    def refuse_if_draining(self) -> None:
        """Raises Draining for operations that another server, or this one after its restart, should take."""
        if self.draining:
            raise Draining("the server is shutting down; retry, and another server will answer")

    def refuse_another_stream(self, tenant: str) -> None:
        """Raises QuotaExceeded if the tenant has reached its limit of streams in this process."""
        quota = self.gate.quota(tenant)
        if quota is not None and quota.streams is not None:
            count = sum(stream.tenant == tenant for stream in self.streams)
            if count >= quota.streams:
                raise QuotaExceeded(f"tenant {tenant!r} has reached its limit of {quota.streams} streams: close some")

    def durability_of(self, requested: str | None) -> str:
        """The durability of a new session. Raises DurabilityUnavailable."""
        durability = requested or self.durability
        if durability not in self.sessions.durabilities:
            raise DurabilityUnavailable(f"durability {durability} needs a store: start the server with --store")
        if durability == "memory" and self.workers is not None:
            raise DurabilityUnavailable(
                "durability memory is unavailable with several workers, because each knows only its own sessions"
            )
        return durability

    def count(self, route: str, status: int, seconds: float) -> None:
        figures = self.requests.get(route)
        if figures is None:
            figures = self.requests[route] = RequestFigures()
        figures.observe(status, seconds)
