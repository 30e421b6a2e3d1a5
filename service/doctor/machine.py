"""Cores, memory, open files and GPU device files of this process, as Linux reports them."""

import os
import resource
from pathlib import Path

from unroll.service.core.resources import host_memory, usable_cores
from unroll.service.doctor.facts import Machine

_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")


def look(root: Path = Path("/")) -> Machine:
    """Collect the facts. `root` is the root of the file system, for tests."""
    memory, free = _memory(root)
    files, files_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Machine(
        cores=_cores(root),
        memory=memory,
        free=free,
        files=files,
        files_limit=files_limit,
        container="KUBERNETES_SERVICE_HOST" in os.environ
        or any((root / mark.lstrip("/")).exists() for mark in _CONTAINER_MARKS),
        nodes=tuple(sorted(str(node) for node in (root / "dev").glob("nvidia*"))),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _cores(root: Path) -> float:
    allowed = float(usable_cores())
    quota, _, period = _control_group(root, "cpu.max").partition(" ")
    return min(allowed, int(quota) / int(period)) if quota.isdigit() else allowed


def _memory(root: Path) -> tuple[int, int]:
    memory, free = host_memory(root)
    limit, used = _control_group(root, "memory.max"), _control_group(root, "memory.current")
    if limit.isdigit() and used.isdigit():
        memory, free = min(memory, int(limit)), min(free, int(limit) - int(used))
    return memory, free


def _control_group(root: Path, name: str) -> str:
    """Read a file of this container's control group; empty outside a container and with version 1."""
    try:
        return (root / "sys/fs/cgroup" / name).read_text().strip()
    except OSError:
        return ""
