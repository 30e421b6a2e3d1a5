"""Hostile bundles: each is refused with its code and affects neither the other bundles nor the server."""

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
from processes import Launched, Process
from waiting import until

from unroll import bundle as bundles
from unroll.bundle import BundleError, Content
from unroll.bundle.errors import REMEDIES, printable
from unroll.service.models.trial import TrialProcess, Trials
from unroll.service.models.trial_process import Job, TrialLimits

ROW = {"inputs": [[[1.0, 2.0, 3.0]]]}
#: Memory limit per bundle, ample for the valid one.
_MEMORY, _SECONDS = 512 * 2**20, 1


on_linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="/proc says which processes there are")


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
    """The reason for each model's refusal, by name."""
    index = httpx.post(f"{process.url}/v2/repository/index").json()
    return {entry["name"]: entry["reason"] for entry in index if entry["state"] == "UNAVAILABLE"}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_bundle_is_refused_with_its_code(reasons: dict[str, str], name: str) -> None:
    code = HOSTILE[name].code
    reason = reasons.get(printable(os.fsdecode(folder(name))), "it is served")
    assert reason.startswith(f"{code}: "), reason
    assert reason.endswith(f"; {REMEDIES[code]}")
    assert reason.isprintable()


def test_valid_bundle_is_served_and_the_server_stops_on_request(process: Process) -> None:
    answer = httpx.post(f"{process.url}/v1/models/good/sequences", json=ROW)
    assert answer.status_code == 200
    refusals = [line for line in process.log if line["event"] == "bundle refused"]
    assert len(refusals) == len(HOSTILE)
    assert all(line["reason"].startswith(line["code"]) and line["path"].isprintable() for line in refusals)
    if sys.platform == "linux":
        [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.popen.pid}/status").read_text())
        assert int(peak) * 1024 < 2 * _MEMORY
    process.popen.send_signal(signal.SIGTERM)
    assert process.end() == 0


@on_linux
def test_endless_trial_does_not_delay_the_shutdown_of_a_starting_server(few: Path, tmp_path: Path) -> None:
    shutil.copytree(few / "gru" / "1", tmp_path / "endless" / "1")
    HOSTILE["a loop of 2^62 turns"].make(tmp_path / "endless" / "1")
    starting = Launched("--repository", str(tmp_path), "--port", "0", "--device", "cpu", "--bundle-time", "3600")
    child = trial_of(starting.pid)
    starting.send_signal(signal.SIGTERM)
    starting.communicate()
    assert starting.returncode == 0
    until(lambda: not running(child), "the end of the trial")


@on_linux
def test_endless_trial_delays_neither_requests_nor_other_bundles_nor_shutdown(few: Path, tmp_path: Path) -> None:
    shutil.copytree(few / "gru" / "1", tmp_path / "gru" / "1")
    process = Process(
        tmp_path, "--bundle-time", "3600", "--log-requests", "none"
    )  # its log is not read during this time
    shutil.copytree(few / "gru" / "1", tmp_path / "endless" / "1")
    HOSTILE["a loop of 2^62 turns"].make(tmp_path / "endless" / "1")
    shutil.copytree(few / "lstm" / "1", tmp_path / "lstm" / "1")
    process.popen.send_signal(signal.SIGHUP)
    until(lambda: httpx.get(f"{process.url}/v1/models/lstm").status_code == 200, "the bundle after the endless one")
    child = trial_of(process.popen.pid)
    assert httpx.get(f"{process.url}/readyz").status_code == 200
    assert httpx.post(f"{process.url}/v1/models/gru/sequences", json=ROW).status_code == 200
    process.popen.send_signal(signal.SIGTERM)
    assert process.end() == 0
    until(lambda: not running(child), "the end of the trial")


def test_timed_out_bundle_does_not_delay_later_scans(few: Path, tmp_path: Path) -> None:
    shutil.copytree(few / "gru" / "1", tmp_path / "endless" / "1")
    HOSTILE["a loop of 2^62 turns"].make(tmp_path / "endless" / "1")
    asked: list[str] = []

    class Counted(TrialProcess):
        def ask(self, job: Job, content: Content) -> dict[str, object] | None:
            asked.append(job.path)
            return super().ask(job, content)

    trials = Trials(TrialLimits(seconds=0.5), Counted)
    for _ in range(2):
        with pytest.raises(BundleError, match="bundle_time"):
            trials.prove(bundles.read_content(tmp_path / "endless" / "1"))
    trials.prove(bundles.read_content(few / "gru" / "1"))
    trials.close()
    assert asked == ["endless/1", "gru/1"]


def test_links_to_a_bundle_and_hard_links_inside_it_are_accepted(few: Path, tmp_path: Path) -> None:
    """Kubernetes mounts volumes with links, and `cp -al` makes hard links."""
    real = tmp_path / "..2026_11_30" / "gru" / "1"
    real.mkdir(parents=True)
    for file in (few / "gru" / "1").iterdir():
        (real / file.name).hardlink_to(file)
    (tmp_path / "..data").symlink_to("..2026_11_30")
    (tmp_path / "gru").symlink_to("..data/gru")
    assert bundles.read(tmp_path / "gru" / "1").manifest.name == "gru"


def test_a_version_that_is_a_mounted_configmap_is_read(few: Path, tmp_path: Path) -> None:
    version = tmp_path / "gru" / "1"
    shutil.copytree(few / "gru" / "1", version / "..2026_11_30")
    (version / "..data").symlink_to("..2026_11_30")
    for file in (version / "..data").iterdir():
        (version / file.name).symlink_to(f"..data/{file.name}")
    assert bundles.read(version).manifest.name == "gru"
    assert bundles.files.stated_digest(version) is not None


def trial_of(server: int) -> int:
    """Wait for the server's trial process to use its processor, and return it."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [child for process in children(server) for child in children(process) if seconds(child) > 0.05]
        return bool(found)

    until(look, "a trial")
    return found[0]


def children(process: int) -> list[int]:
    try:
        return [
            int(pid) for path in Path(f"/proc/{process}/task").glob("*/children") for pid in path.read_text().split()
        ]
    except FileNotFoundError:
        return []


def seconds(process: int) -> float:
    """Return the processor time of a process."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
