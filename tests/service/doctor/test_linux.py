"""Linux process information, read from synthetic file systems."""

import os
from pathlib import Path

import pytest

from unroll.service.doctor import machine

KIB = 1024


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBERNETES_SERVICE_HOST", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("proc", "dev", "sys/fs/cgroup"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8000 kB\nMemFree: 1000 kB\nMemAvailable: 6000 kB\nHugePages: 0\n")
    return tmp_path


def test_a_plain_machine(root: Path):
    found = machine.look(root)
    assert (found.memory, found.free) == (8000 * KIB, 6000 * KIB)
    assert found.cores == len(os.sched_getaffinity(0))
    assert (found.container, found.nodes, found.visible_devices) == (False, (), None)
    assert 0 < found.files <= found.files_limit


def test_a_container_with_limits_and_a_gpu(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (root / ".dockerenv").touch()
    for node in ("nvidia0", "nvidiactl", "null"):
        (root / "dev" / node).touch()
    limits = {"cpu.max": "50000 100000", "memory.max": f"{4000 * KIB}", "memory.current": f"{3000 * KIB}"}
    for name, limit in limits.items():
        (root / "sys/fs/cgroup" / name).write_text(f"{limit}\n")
    found = machine.look(root)
    assert found.container
    assert [Path(node).name for node in found.nodes] == ["nvidia0", "nvidiactl"]
    assert (found.cores, found.memory, found.free) == (0.5, 4000 * KIB, 1000 * KIB)
    assert found.visible_devices == "0"


def test_a_container_without_limits(root: Path):
    for name in ("cpu.max", "memory.max"):
        (root / "sys/fs/cgroup" / name).write_text("max 100000\n" if name == "cpu.max" else "max\n")
    assert machine.look(root).memory == 8000 * KIB


def test_kubernetes(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert machine.look(root).container


def test_a_system_other_than_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without Linux's scheduler calls and files, such as macOS."""
    monkeypatch.delattr(os, "sched_getaffinity")
    found = machine.look(tmp_path)
    assert found.cores == os.cpu_count()
    assert 0 < found.free < found.memory
