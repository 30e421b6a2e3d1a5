"""What every route needs: the catalog, the limits, the figures."""

from dataclasses import dataclass, field

from service.catalog.catalog import Catalog
from service.state.held import SnapshotKeys
from service.telemetry.metrics import RequestFigures


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """request_timeout: seconds until a request must have begun to run, unless it brings its own."""

    request_timeout: float = 30.0
    max_body_bytes: int = 16 * 2**20
    max_json_bytes: int = 2 * 2**20


@dataclass(slots=True)
class Server:
    """durability: of sessions that do not say it. snapshot_keys: for states that clients hold, if they may.
    requests: figures by inference route. streams: the open ones.

    crashed: a model's loop ended by an error, and the process is to end.
    """

    catalog: Catalog
    limits: ApiLimits
    durability: str = "memory"
    snapshot_keys: SnapshotKeys | None = None
    requests: dict[str, RequestFigures] = field(default_factory=dict)
    streams: set[object] = field(default_factory=set)
    ready: bool = False
    crashed: bool = False

    def count(self, route: str, status: int, seconds: float) -> None:
        """A request of an inference route was answered."""
        figures = self.requests.get(route)
        if figures is None:
            figures = self.requests[route] = RequestFigures()
        figures.observe(status, seconds)
