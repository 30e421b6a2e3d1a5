"""Says on stderr what export is doing, and how long it took."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

#: Seconds below which the time of a stage is not said.
_SHORT = 1.0


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Gives a function to call with each stage as it begins: a line each, with its seconds if it took more than one."""
    begun: list[float] = []

    def end() -> None:
        if begun:
            seconds = monotonic() - begun.pop()
            print(f" {seconds:.1f} s" if seconds >= _SHORT else "", file=sys.stderr, flush=True)

    def begin(stage: str) -> None:
        end()
        begun.append(monotonic())
        print(f"{stage} ...", end="", file=sys.stderr, flush=True)

    try:
        yield begin
    finally:
        end()
