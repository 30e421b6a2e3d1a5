"""Counters for metrics."""

from dataclasses import dataclass, field

from unroll.service.core.errors import SessionGone, UnrollError


@dataclass(slots=True)
class Counters:
    """Totals since the start.

    Attributes:
        failed: Chunks, by error code.
        gone: Expired and evicted sessions, by error code.
        rollout_steps: Steps that rollouts ran, including cancelled rollouts.
    """

    steps: int = 0
    chunks: int = 0
    batches: int = 0
    padded_steps: int = 0
    replayed: int = 0
    refused: int = 0
    opened: int = 0
    adopted: int = 0
    restarted: int = 0
    rollout_steps: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict)

    def count_failed(self, error: UnrollError) -> None:
        self.failed[error.code] = self.failed.get(error.code, 0) + 1

    def count_gone(self, cause: type[SessionGone]) -> None:
        self.gone[cause.code] = self.gone.get(cause.code, 0) + 1
