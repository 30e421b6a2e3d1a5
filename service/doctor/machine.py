"""Cores, memory, open files, and whether this is a container that sees a GPU: what Linux says of this process."""

import os
import resource
from pathlib import Path

from unroll.service.core.resources import host_memory, usable_cores
from unroll.service.doctor.facts import Machine

_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")


def look(root: Path = Path("/")) -> Machine:
    """root: of the file system, for tests."""
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
    """Bytes in all, and available."""
    memory, free = host_memory(root)
    limit, used = _control_group(root, "memory.max"), _control_group(root, "memory.current")
    if limit.isdigit() and used.isdigit():
        memory, free = min(memory, int(limit)), min(free, int(limit) - int(used))
    return memory, free


def _control_group(root: Path, name: str) -> str:
    """Of a container its own; empty where there is none (outside a container, or with version 1)."""
    try:
        return (root / "sys/fs/cgroup" / name).read_text().strip()
    except OSError:
        return ""
