"""Flow control of one connection: counts unanswered work, and pauses reading."""

from collections.abc import Callable

#: Unanswered entries at which reading stops, and bytes of their inputs and outputs.
WINDOW = 2048
WINDOW_BYTES = 16 * 2**20


class FlowControl:
    """Pauses reading while too much is unanswered, or for another reason.

    Args:
        step_bytes: Size of the inputs and outputs of one step.
        pause, resume: Stop and restart reading.
        on_drained: Called once, when the connection is draining and everything is answered.

    Attributes:
        busy: A control message or a message behind it is being handled.
        throttled: The client exceeded the rate of control messages.
        backlogged: Messages are waiting behind a control message. A control message alone does not pause reading, so
            that a disconnect is noticed.
        draining: Reading has stopped for good; the connection closes when everything is answered.
        drained: `on_drained` was called; messages that still arrive are ignored.
        writable: The client reads.
    """

    def __init__(
        self,
        step_bytes: int,
        pause: Callable[[], None],
        resume: Callable[[], None],
        on_drained: Callable[[], None],
    ) -> None:
        self._step_bytes = step_bytes
        self._pause, self._resume = pause, resume
        self._on_drained = on_drained
        self.entries = self._steps = 0
        self.paused = self.busy = self.backlogged = self.throttled = False
        self.writable = True
        self.draining = self.drained = False

    @property
    def state(self) -> str:
        """Whether the connection is being read, and if not, why; for `repr`."""
        if not self.paused:
            return "open"
        reasons = {
            "window": self._is_full(),
            "control": self.backlogged,
            "rate": self.throttled,
            "client": not self.writable,
            "draining": self.draining,
        }
        return f"paused by {' and '.join(reason for reason, holds in reasons.items() if holds)}"

    def acquire(self, entries: int, steps: int) -> None:
        """Count entries and their total steps as unanswered. Call `update` after they are submitted."""
        self.entries += entries
        self._steps += steps

    def release(self, entries: int, steps: int) -> None:
        self.entries -= entries
        self._steps -= steps
        if self.paused:
            self.update()

    def update(self) -> None:
        """Pause or resume reading, and detect the end of a drain."""
        paused = self._is_full() or self.backlogged or self.throttled or self.draining or not self.writable
        if paused != self.paused:
            self.paused = paused
            (self._pause if paused else self._resume)()
        if self.draining and not (self.entries or self.busy or self.drained):
            self.drained = True
            self._on_drained()

    def clear(self) -> None:
        """Forget all unanswered entries after the connection ended."""
        self.entries = self._steps = 0

    def _is_full(self) -> bool:
        return self.entries > WINDOW or self._steps * self._step_bytes > WINDOW_BYTES
