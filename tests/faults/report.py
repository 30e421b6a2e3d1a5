"""The final report and exit status of a long run."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from faults.client import Tally
from faults.history import Verdict

_MOST = 20


class Result(Protocol):
    """The result of a run; `str(result)` is the last line of the report."""

    verdict: Verdict
    tally: Tally

    def waits(self) -> str: ...


def end(result: Result, folder: Path, *, good: bool, crashes: Sequence[str] = ()) -> int:
    """Print the report and return the exit status. Keep the logs on any failure.

    good: Whether all checks other than the verdict and the crashes passed.
    """
    for finding in [*result.verdict.findings[:_MOST], *crashes[:_MOST]]:
        print(finding)
    print(", ".join(f"{count} {what}" for what, count in result.tally.outcomes.most_common()))
    print(result.waits())
    good = good and result.verdict.good and not crashes
    if good:
        shutil.rmtree(folder)
    else:
        print(f"logs: {folder}")
    print(result)
    return 0 if good else 1
