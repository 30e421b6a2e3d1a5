"""What every route needs: the catalog, the limits, the figures."""

from dataclasses import dataclass, field
from typing import Protocol

from unroll.service.catalog.catalog import Catalog
from unroll.service.core.errors import Draining
from unroll.service.state.sealed_snapshot import SnapshotKeys
from unroll.service.telemetry.metrics import RequestFigures


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """request_timeout: seconds until a request must have begun to run, unless it brings its own."""

    request_timeout: float = 30.0
    max_body_bytes: int = 16 * 2**20
    max_json_bytes: int = 2 * 2**20


class Drainable(Protocol):
    def drain(self) -> None:
        """End in order."""
        ...


@dataclass(slots=True)
class AppState:
    """durability: of sessions that do not say it. snapshot_keys: for states that clients hold, if they may.
    shared_port: on which other processes listen, too, so that a client's next connection may reach another.
    requests: figures by inference route. streams: the open ones.

    draining: the process is to end; it finishes what it has, and takes no session on. crashed: a model's loop ended by
    an error, and the process is to end.
    """

    catalog: Catalog
    limits: ApiLimits
    durability: str = "memory"
    snapshot_keys: SnapshotKeys | None = None
    shared_port: int | None = None
    requests: dict[str, RequestFigures] = field(default_factory=dict)
    streams: set[Drainable] = field(default_factory=set)
    ready: bool = False
    draining: bool = False
    crashed: bool = False

    @property
    def in_flight(self) -> int:
        """Chunks accepted and not yet answered, of all models."""
        return sum(model.scheduler.in_flight for model in self.catalog)

    def drain(self) -> None:
        """Not ready any more, and nothing new from now on."""
        self.ready, self.draining = False, True

    def refuse_if_draining(self) -> None:
        """Raises Draining: a session is not opened, forked or resumed here any more, but it is elsewhere, or soon."""
        if self.draining:
            raise Draining("the server is about to end: try again, another one will answer")

    def count(self, route: str, status: int, seconds: float) -> None:
        """A request of an inference route was answered."""
        figures = self.requests.get(route)
        if figures is None:
            figures = self.requests[route] = RequestFigures()
        figures.observe(status, seconds)
