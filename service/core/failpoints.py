"""Failpoints: places where tests kill or stop the process. An unarmed failpoint costs one comparison.

    recv           a complete request to an inference route was read
    batched        a batch was formed
    ran            the batch was run
    before_commit  its durable sessions are about to be committed
    after_commit   the store has replied
    before_reply   a reply is about to be written

They are armed only by the environment: UNROLL_FAILPOINTS="before_commit=kill:3,ran=stop:1" sends the process SIGKILL
before its third commit, and SIGSTOP after its first batch.
"""

import os
import signal

NAMES = frozenset({"recv", "batched", "ran", "before_commit", "after_commit", "before_reply"})
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def reach(name: str) -> None:
    if _armed is not None:
        _armed.reach(name)


class _Armed:
    def __init__(self, text: str) -> None:
        """Raises ValueError."""
        self._left: dict[str, int] = {}
        self._signals: dict[str, signal.Signals] = {}
        for word in text.split(","):
            name, _, does = word.partition("=")
            what, _, times = does.partition(":")
            if name not in NAMES or what not in _SIGNALS or not times.isdigit():
                raise ValueError(f"UNROLL_FAILPOINTS has {word!r}; it should be NAME=kill:N or NAME=stop:N")
            self._left[name], self._signals[name] = int(times), _SIGNALS[what]

    def reach(self, name: str) -> None:
        if name in self._left:
            self._left[name] -= 1
            if self._left[name] == 0:
                os.kill(os.getpid(), self._signals[name])


_armed = _Armed(os.environ["UNROLL_FAILPOINTS"]) if "UNROLL_FAILPOINTS" in os.environ else None
