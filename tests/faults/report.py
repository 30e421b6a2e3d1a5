"""The final report and exit status of a long run."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from faults.client import Told
from faults.history import Verdict

_MOST = 20


class Result(Protocol):
    """The verdict; `str(verdict)` is the last line."""

    verdict: Verdict
    told: Told

    def waits(self) -> str: ...


def end(result: Result, folder: Path, *, good: bool, crashes: Sequence[str] = ()) -> int:
    """good: whether everything except the verdict and the crashes passed. On any failure the logs are kept."""
    for finding in [*result.verdict.findings[:_MOST], *crashes[:_MOST]]:
        print(finding)
    print(", ".join(f"{count} {what}" for what, count in result.told.outcomes.most_common()))
    print(result.waits())
    good = good and result.verdict.good and not crashes
    if good:
        shutil.rmtree(folder)
    else:
        print(f"logs: {folder}")
    print(result)
    return 0 if good else 1
