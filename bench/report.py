"""What a run found, as a table and as JSON, with all that is needed to run it again."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from bench.load import Measured
from bench.subjects import Subject

#: Above this share of its own ceiling, the load generator slows down what it measures.
LOAD_BOUND = 0.85
_BUSY = 0.7
_PACKAGES = (
    "unroll",
    "uvicorn",
    "uvloop",
    "httptools",
    "fastapi",
    "starlette",
    "numpy",
    "orjson",
    "onnxruntime",
    "onnxruntime-gpu",
)


def summary(subjects: Sequence[Subject], measured: Mapping[str, Sequence[Measured]]) -> dict[str, dict[str, Any]]:
    """One entry per subject; rates are requests per second."""
    rates = {name: median(run.rate for run in runs) for name, runs in measured.items()}
    return {
        subject.name: {
            "what": subject.what,
            "rate": rates[subject.name],
            "rates": [run.rate for run in measured[subject.name]],
            "p50_ms": median(run.p50 for run in measured[subject.name]),
            "p99_ms": median(run.p99 for run in measured[subject.name]),
            "of_echo": rates[subject.name] / rates["echo"],
            "of_naive": rates[subject.name] / rates["naive"],
            "load_bound": subject.name != "ceiling" and rates[subject.name] > LOAD_BOUND * rates["ceiling"],
            "errors": sum(run.errors for run in measured[subject.name]),
        }
        for subject in subjects
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{'':<13}{'requests/s (min–max)':>26}{'p50 ms':>9}{'p99 ms':>9}{'of echo':>9}{'of naive':>10}"]
    for name, row in results.items():
        rate = f"{row['rate']:,.0f} ({min(row['rates']):,.0f}–{max(row['rates']):,.0f})"
        figures = f"{row['p50_ms']:>9.2f}{row['p99_ms']:>9.2f}{row['of_echo']:>9.2f}{row['of_naive']:>10.2f}"
        remark = "  at least: the load generator is the limit" if row["load_bound"] else ""
        lines.append(f"{name:<13}{rate:>26}{figures}{remark}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    return {
        "command": [Path(sys.executable).name, "-m", "bench.steps", *sys.argv[1:]],
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": _cpu(),
        "cores": sorted(os.sched_getaffinity(0)),
        "load_average_before": os.getloadavg()[0],
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def remarks(about: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures must know of the circumstances."""
    found = []
    if len(about["cores"]) == 1:
        found.append("only one core: server and load generator share it, so the figures are of both together")
    if about["load_average_before"] > _BUSY:
        found.append(f"the machine was busy: load average {about['load_average_before']:.1f} before the run")
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
