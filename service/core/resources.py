"""The processors and memory that this process may use.

Linux reports both exactly. Elsewhere (macOS), all processors count, and half of the memory as available.
"""

import os
from pathlib import Path


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Return the total and the available memory of the host.

    Args:
        root: Root of the file system, for tests.

    Returns:
        (total, available) in bytes.
    """
    try:
        lines = [line.split() for line in (root / "proc/meminfo").read_text().splitlines()]
    except FileNotFoundError:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total // 2
    kibibytes = {name: int(amount) for name, amount, *_ in lines}
    return kibibytes["MemTotal:"] * 1024, kibibytes["MemAvailable:"] * 1024
