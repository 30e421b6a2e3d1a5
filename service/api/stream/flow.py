"""Flow control of one connection: what of it is unanswered, and why nothing is read from it now."""

from collections.abc import Callable

#: Entries of a connection that may be unanswered before reading stops, and bytes of their inputs and outputs.
WINDOW = 2048
WINDOW_BYTES = 16 * 2**20


class FlowControl:
    """Pauses reading while too much is unanswered, or while another reason holds.

    Args:
        on_drained: called once, when the connection drains and everything that was read is answered.

    Attributes:
        busy: a control message, or what waits behind one, is being worked on.
        throttled: the client has sent more control messages than it may, and waits.
        backlogged: messages wait behind a control message. Until then the connection is read, to notice its end.
        draining: nothing more is read; the connection ends when everything is answered.
        drained: `on_drained` was called; messages that still arrive are ignored.
    """

    __slots__ = (
        "_on_drained",
        "_pause",
        "_resume",
        "_step_bytes",
        "_steps",
        "backlogged",
        "busy",
        "drained",
        "draining",
        "entries",
        "paused",
        "throttled",
        "writable",
    )

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
        """Whether the connection is read from, and if not, why: for logs and `repr`."""
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
        """Count entries, and the steps of all of them, as unanswered. `update` follows when they are submitted."""
        self.entries += entries
        self._steps += steps

    def release(self, entries: int, steps: int) -> None:
        self.entries -= entries
        self._steps -= steps
        if self.paused:
            self.update()

    def update(self) -> None:
        """Pause or resume reading, and notice the end of a drain."""
        paused = self._is_full() or self.backlogged or self.throttled or self.draining or not self.writable
        if paused != self.paused:
            self.paused = paused
            (self._pause if paused else self._resume)()
        if self.draining and not (self.entries or self.busy or self.drained):
            self.drained = True
            self._on_drained()

    def clear(self) -> None:
        """The connection is gone, and with it what was unanswered."""
        self.entries = self._steps = 0

    def _is_full(self) -> bool:
        return self.entries > WINDOW or self._steps * self._step_bytes > WINDOW_BYTES
