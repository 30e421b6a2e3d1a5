"""Bundles made to harm: each is refused with its code, and takes nothing from the others or from the server."""

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from damage import describe
from hostile import HOSTILE
from processes import Process

from unroll.bundle.errors import REMEDIES, printable

#: Of the bundles; so much is more than enough for the good one.
_MEMORY, _SECONDS = 512 * 2**20, 1


def folder(name: str) -> bytes:
    return HOSTILE[name].folder or re.sub("[^A-Za-z0-9_-]", "_", name).encode()[:64]


@pytest.fixture(scope="module")
def shelf(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile")
    shutil.copytree(few / "gru" / "1", path / "good" / "1")
    describe(path / "good" / "1", name="good")
    for name, hostile in HOSTILE.items():
        version = Path(os.fsdecode(os.path.join(os.fsencode(path), folder(name)))) / "1"
        shutil.copytree(few / "gru" / "1", version)
        hostile.make(version)
    return path


@pytest.fixture(scope="module")
def process(shelf: Path) -> Iterator[Process]:
    process = Process(shelf, "--bundle-memory", str(_MEMORY), "--bundle-time", str(_SECONDS))
    yield process
    if process.popen.poll() is None:
        process.popen.kill()
        process.end()


@pytest.fixture(scope="module")
def reasons(process: Process) -> dict[str, str]:
    """Why each model is refused, by name."""
    index = httpx.post(f"{process.url}/v2/repository/index").json()
    return {entry["name"]: entry["reason"] for entry in index if entry["state"] == "UNAVAILABLE"}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_bundle_is_refused_with_its_code(reasons: dict[str, str], name: str) -> None:
    code = HOSTILE[name].code
    reason = reasons.get(printable(os.fsdecode(folder(name))), "it is served")
    assert reason.startswith(f"{code}: "), reason
    assert reason.endswith(f"; {REMEDIES[code]}")
    assert reason.isprintable()


def test_the_bundle_beside_them_serves_and_the_server_ends_when_it_is_told_to(process: Process) -> None:
    answer = httpx.post(f"{process.url}/v1/models/good/sequences", json={"inputs": [[[1.0, 2.0, 3.0]]]})
    assert answer.status_code == 200
    refusals = [line for line in process.log if line["event"] == "bundle refused"]
    assert len(refusals) == len(HOSTILE)
    assert all(line["reason"].startswith(line["code"]) and line["path"].isprintable() for line in refusals)
    if sys.platform == "linux":
        [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.popen.pid}/status").read_text())
        assert int(peak) * 1024 < 2 * _MEMORY
    process.popen.send_signal(signal.SIGTERM)
    assert process.end() == 0
