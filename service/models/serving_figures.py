"""The figures of one served version."""

from typing import Any

from unroll.service.core.clock import Clock
from unroll.service.scheduler.batch import Batch
from unroll.service.scheduler.scheduler import Scheduler
from unroll.service.telemetry.metrics import ROWS, SECONDS, Histogram, ModelFigures
from unroll.service.telemetry.statistics import Statistics


class ServingFigures:
    """Figures of one version on one device; `statistics` are shared by all devices of the version."""

    def __init__(self, scheduler: Scheduler, clock: Clock, statistics: Statistics) -> None:
        self.statistics = statistics
        self._scheduler = scheduler
        self._clock = clock
        self._batch_rows = Histogram(ROWS)
        self._batch_seconds = Histogram(SECONDS)
        self._answered = 0

    def observe(self, batch: Batch, failed: int, seconds: float) -> None:
        """Count a finished batch; failed: rows without an answer; seconds: duration of the call."""
        self._batch_rows.observe(batch.rows)
        self._batch_seconds.observe(seconds)
        answered = self._scheduler.counters.chunks
        now = self._clock.now()
        self.statistics.observe(now, batch.rows, batch.steps, answered - self._answered, failed, batch.waited, seconds)
        self._answered = answered

    def document(self, wall: float) -> dict[str, Any]:
        """The statistics of the Open Inference Protocol; wall: seconds since 1970."""
        return self.statistics.document(self._clock.now(), wall)

    def of(self, name: str, version: str, device: str) -> ModelFigures:
        scheduler, counters = self._scheduler, self._scheduler.counters
        return ModelFigures(
            name,
            version,
            device,
            gauges={
                "unroll_sessions": len(scheduler.sessions),
                "unroll_session_capacity": scheduler.sessions.limits.capacity,
                "unroll_chunks_in_flight": scheduler.in_flight,
                "unroll_estimated_wait_seconds": scheduler.estimated_wait(),
                "unroll_rollouts": len(scheduler.rollouts),
            },
            counters={
                "unroll_steps": counters.steps,
                "unroll_chunks": counters.chunks,
                "unroll_batches": counters.batches,
                "unroll_padded_steps": counters.padded_steps,
                "unroll_replayed": counters.replayed,
                "unroll_refused": counters.refused,
                "unroll_sessions_opened": counters.opened,
                "unroll_sessions_adopted": counters.adopted,
                "unroll_sessions_restarted": counters.restarted,
                "unroll_rollout_steps": counters.rollout_steps,
            },
            labelled={
                ("unroll_failed", "code"): counters.failed,
                ("unroll_sessions_gone", "code"): counters.gone,
            },
            histograms={"unroll_batch_rows": self._batch_rows, "unroll_batch_seconds": self._batch_seconds},
        )
