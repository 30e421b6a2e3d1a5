"""Statistics of a model version for the Open Inference Protocol, updated once per batch."""

from collections.abc import Sequence
from typing import Any


class Statistics:
    """Counts since the model was loaded.

    A row is a request's part of a batch; a request that runs in pieces has rows in several batches. A batch's duration
    counts for every row, because every row waited for it.

    warm_up: (rows, steps, seconds) of the calls measured at load. best_rows: the best batch size among them.
    """

    def __init__(self, warm_up: Sequence[tuple[int, int, float]] = (), best_rows: int = 0) -> None:
        self._warm_up = tuple(warm_up)
        self._best_rows = best_rows
        self._last: float | None = None
        self._answered = self._failed = self._steps = 0
        self._queue_seconds = self._failed_seconds = 0.0
        #: Number of batches and their total seconds, by rows per batch.
        self._batches: dict[int, list[float]] = {}

    def observe(
        self,
        now: float,
        rows: int,
        steps: int,
        answered: int,
        failed: int,
        queue_seconds: float,
        run_seconds: float,
    ) -> None:
        """Record a batch.

        Args:
            now: Time on the server's clock.
            steps, queue_seconds: Totals over all rows.
            answered, failed: Requests that ended with this batch; other rows have more pieces to run.
        """
        self._last = now
        self._steps += steps
        self._answered += answered
        self._queue_seconds += queue_seconds
        if failed:
            self._failed += failed
            self._failed_seconds += failed * run_seconds
        batches = self._batches.get(rows)
        if batches is None:
            batches = self._batches[rows] = [0, 0.0]
        batches[0] += 1
        batches[1] += run_seconds

    def document(self, now: float, wall: float) -> dict[str, Any]:
        """The fields of `model_stats` except name and version. now: on the server's clock. wall: Unix time."""
        by_size = sorted(self._batches.items())
        rows = sum(size * int(batches[0]) for size, batches in by_size)
        spent = sum(size * seconds for size, (_, seconds) in by_size)
        succeeded = max(0.0, self._queue_seconds + spent - self._failed_seconds)
        return {
            "last_inference": 0 if self._last is None else int((wall - (now - self._last)) * 1e3),
            "inference_count": self._answered,
            "execution_count": sum(int(batches[0]) for _, batches in by_size),
            "inference_stats": {
                "success": _duration(self._answered, succeeded),
                "fail": _duration(self._failed, self._failed_seconds),
                "queue": _duration(rows, self._queue_seconds),
                **_compute(rows, spent),
            },
            "batch_stats": [{"batch_size": size, **_compute(int(n), seconds)} for size, (n, seconds) in by_size],
            "step_count": self._steps,
            "warm_up": [{"rows": r, "steps": s, "ns": _nanoseconds(seconds)} for r, s, seconds in self._warm_up],
            "best_batch_size": self._best_rows,
        }


def _compute(count: int, seconds: float) -> dict[str, dict[str, int]]:
    """A batch is measured as a whole, so gathering and scattering count as inference."""
    parts = {"compute_input": 0.0, "compute_infer": seconds, "compute_output": 0.0}
    return {name: _duration(count, spent) for name, spent in parts.items()}


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": _nanoseconds(seconds)}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
