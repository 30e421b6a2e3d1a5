"""The machine and the versions of a run."""

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_BUSY = 0.7
_PACKAGES = (
    "unroll-serve",
    "uvicorn",
    "uvloop",
    "httptools",
    "websockets",
    "fastapi",
    "starlette",
    "pydantic",
    "numpy",
    "orjson",
    "onnxruntime",
    "onnxruntime-gpu",
)


def describe(options: Sequence[str]) -> dict[str, Any]:
    """Describe the machine and the run, with its command line options."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": ["python", "-m", "bench", *options],
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": _cpu(),
        "cores": sorted(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_before": os.getloadavg()[0],
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def remarks(about: Mapping[str, Any]) -> list[str]:
    """Circumstances that a reader of the figures must know."""
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
