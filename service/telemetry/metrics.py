"""Prometheus metrics, collected at scrape time; the step path only increments plain integers."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from prometheus_client import generate_latest, registry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
#: Outcomes of a commit: written; another replica was first; the store did not answer or could not write.
COMMIT_OUTCOMES = ("stored", "contended", "unavailable")

#: Limits of connections: per process, and per client address.
OF_ALL, OF_ADDRESS = "process", "address"

#: Maximum length of a reason in a label; the log has the full text.
_REASON_CHARACTERS = 300


class Histogram:
    """Counts of values by bucket, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative buckets as (upper bound, count), as in Prometheus."""
        labels = [*(str(bound) for bound in self.bounds), "+Inf"]
        return list(zip(labels, map(float, accumulate(self.counts)), strict=True))


@dataclass(slots=True)
class RequestFigures:
    """Requests of one route: counts by status, and durations in seconds."""

    by_status: dict[int, int] = field(default_factory=dict)
    seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))

    def observe(self, status: int, seconds: float) -> None:
        self.by_status[status] = self.by_status.get(status, 0) + 1
        self.seconds.observe(seconds)


@dataclass(slots=True)
class ConnectionFigures:
    """Open connections of the main port, and refused ones by limit."""

    open: Sized = ()
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys((OF_ALL, OF_ADDRESS), 0))


@dataclass(slots=True)
class StoreFigures:
    """Figures of a session store in this process.

    Attributes:
        up: Whether it answered last.
        commits: Number of commits by outcome.
        exchange_seconds: Durations of exchanges, which carry the calls of many sessions.
        evicts: Whether a Redis evicts sessions when its memory is full; None: unknown, or not a Redis.
        bytes: Sizes of an embedded store by kind, updated once a second.
    """

    up: bool = True
    commits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COMMIT_OUTCOMES, 0))
    exchange_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    evicts: bool | None = None
    bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """Figures of one model version at scrape time: gauges and counters by name, labelled ones by (name, label)."""

    name: str
    version: str
    device: str
    gauges: Mapping[str, float]
    counters: Mapping[str, float]
    labelled: Mapping[tuple[str, str], Mapping[str, int]]
    histograms: Mapping[str, Histogram]


HELP = {
    "unroll_sessions": "Open sessions.",
    "unroll_session_capacity": "Maximum number of open sessions.",
    "unroll_chunks_in_flight": "Requests accepted and not yet answered.",
    "unroll_estimated_wait_seconds": "Time until work accepted now would start.",
    "unroll_rollouts": "Running rollouts.",
    "unroll_rollout_steps": "Time steps run by rollouts, including cancelled ones.",
    "unroll_steps": "Time steps applied.",
    "unroll_chunks": "Requests applied.",
    "unroll_batches": "Calls of the model.",
    "unroll_padded_steps": "Time steps computed only as padding.",
    "unroll_replayed": "Retries answered without running the model.",
    "unroll_refused": "Requests refused for lack of capacity or time.",
    "unroll_sessions_opened": "Sessions opened.",
    "unroll_sessions_adopted": "Sessions loaded from the store or from host memory.",
    "unroll_sessions_restarted": "Open sessions ended by a sequence_start under their id.",
    "unroll_sessions_gone": "Sessions lost to expiry or eviction.",
    "unroll_failed": "Accepted requests that failed, by error code.",
    "unroll_batch_rows": "Rows in a call of the model.",
    "unroll_batch_seconds": "Duration of a call of the model.",
    "unroll_sessions_spilled": "Memory sessions without a row, in host memory.",
    "unroll_bundle_refused": "1 for each bundle that cannot be served, and each pointer (no version) not followed.",
    "unroll_store_up": "1 if the session store answers.",
    "unroll_store_commits": "Commits of sessions to the store, by outcome.",
    "unroll_store_exchange_seconds": "Duration of exchanges with the store; one carries calls of many sessions.",
    "unroll_store_evicts": "1 if a Redis evicts sessions when its memory is full, by its maxmemory-policy.",
    "unroll_store_bytes": "Size of an embedded store: its file, and the part of it in use.",
    "unroll_held_bytes": "Bytes held for requests and answers, by kind.",
    "unroll_connections": "Open connections, including streams, excluding the operator's port.",
    "unroll_connections_refused": "Connections refused because there were too many, by the exceeded limit.",
    "unroll_streams": "Open WebSocket streams.",
    "unroll_requests": "HTTP requests on the inference routes.",
    "unroll_request_seconds": "Duration of HTTP requests on the inference routes.",
}


class Collector:
    def __init__(
        self,
        models: Callable[[], Iterable[ModelFigures]],
        requests: Mapping[str, RequestFigures],
        streams: Sized,
        spilled: Sized,
        refused: Callable[[], Mapping[tuple[str, str], str]],
        store: StoreFigures | None = None,
        held: Mapping[str, int] | None = None,
        connections: ConnectionFigures | None = None,
    ) -> None:
        self._models = models
        self._requests = requests
        self._streams = streams
        self._spilled = spilled
        self._refused = refused
        self._store = store
        self._held = held or {}
        self._connections = connections or ConnectionFigures()

    def exposition(self) -> Iterator[bytes]:
        """The text of a scrape as of now, one family at a time."""
        return (generate_latest(_Single(family)) for family in self._collect())

    def _collect(self) -> Iterable[Metric]:
        families = _Families()
        families.gauge("unroll_streams", len(self._streams))
        families.gauge("unroll_sessions_spilled", len(self._spilled))
        families.gauge("unroll_connections", len(self._connections.open))
        families.counters("unroll_connections_refused", self._connections.refused, "limit")
        for kind, size in self._held.items():
            families.gauge("unroll_held_bytes", size, kind=kind)
        for (name, version), why in self._refused().items():
            families.gauge("unroll_bundle_refused", 1, model=name, version=version, reason=why[:_REASON_CHARACTERS])
        for model in self._models():
            own = {"model": model.name, "version": model.version, "device": model.device}
            for name, value in model.gauges.items():
                families.gauge(name, value, **own)
            for name, value in model.counters.items():
                families.of(CounterMetricFamily, name, *own).add_metric([*own.values()], value)
            for (name, label), counts in model.labelled.items():
                families.counters(name, counts, label, **own)
            for name, histogram in model.histograms.items():
                families.histogram(name, histogram, **own)
        for route, figures in self._requests.items():
            families.counters("unroll_requests", figures.by_status, "status", route=route)
            families.histogram("unroll_request_seconds", figures.seconds, route=route)
        if (store := self._store) is not None:
            families.gauge("unroll_store_up", store.up)
            families.counters("unroll_store_commits", store.commits, "outcome")
            families.histogram("unroll_store_exchange_seconds", store.exchange_seconds)
            if store.evicts is not None:
                families.gauge("unroll_store_evicts", store.evicts)
            for kind, size in store.bytes.items():
                families.gauge("unroll_store_bytes", size, kind=kind)
        return families.values()


class _Families(dict[str, Any]):
    """The families of a scrape by name, in the order of their first use."""

    def of(self, kind: Callable[..., Metric], name: str, *labels: str) -> Any:
        if name not in self:
            self[name] = kind(name, HELP[name], labels=labels)
        return self[name]

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self.of(GaugeMetricFamily, name, *labels).add_metric([*labels.values()], float(value))

    def counters(self, name: str, counts: Mapping[Any, int], by: str, **labels: str) -> None:
        """Add one counter for each key, which is the value of the label `by`."""
        family = self.of(CounterMetricFamily, name, *labels, by)
        for key, count in counts.items():
            family.add_metric([*labels.values(), str(key)], count)

    def histogram(self, name: str, histogram: Histogram, **labels: str) -> None:
        family = self.of(HistogramMetricFamily, name, *labels)
        family.add_metric([*labels.values()], histogram.buckets(), histogram.sum)


class _Single(registry.Collector):
    """Wraps one family for `generate_latest`."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family
