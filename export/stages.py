"""Shows the progress of export on stderr: updated in place on a terminal, otherwise one line per stage."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, Task, TextColumn
from rich.text import Text

#: Stages shorter than this, in seconds, are shown without their time.
_SHORT = 1.0


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Yields a function to call at the start of each stage."""
    with (_drawn if sys.stderr.isatty() else _printed)() as begin:
        yield begin


@contextmanager
def _drawn() -> Iterator[Callable[[str], None]]:
    columns = SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), _Seconds()
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as progress:

        def end() -> None:
            for task in progress.task_ids:
                progress.update(task, total=1, completed=1)

        def begin(stage: str) -> None:
            end()
            progress.add_task(stage, total=None)

        yield begin
        end()


class _Seconds(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        seconds = (task.finished_time if task.finished else task.elapsed) or 0.0
        return Text(f"{seconds:.1f} s" if seconds >= _SHORT else "", style="progress.elapsed")


@contextmanager
def _printed() -> Iterator[Callable[[str], None]]:
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
