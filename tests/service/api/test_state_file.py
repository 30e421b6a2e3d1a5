"""`--state-file`: sessions move from one process to the next; losses show in the exit status and a count."""

import json
import resource
import shutil
import signal
import stat
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path

import httpx
import pytest
from damage import describe
from processes import Launched, Process, StartProcess
from serving import Serve
from structlog.testing import capture_logs
from waiting import PATIENCE

from unroll import cli
from unroll.service.state.envelope import checksum

SESSIONS = "/v1/models/gru/sessions"
NAMES = ["a", "b", "c"]


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state") / "sessions"


@pytest.fixture
def start(start_process: StartProcess, path: Path) -> Callable[..., Process]:
    return lambda *flags, **options: start_process("--state-file", str(path), *flags, **options)


def step(url: str, session: str) -> int:
    """Step a session; return its position, or -1 if the session is unknown."""
    answer = httpx.post(f"{url}{SESSIONS}/{session}/steps", json={"inputs": [[0.1, 0.2, 0.3]]})
    return answer.json().get("position", -1)


def end(process: Process) -> int:
    process.popen.send_signal(signal.SIGTERM)
    return process.end()


def wait_for_lines(process: Launched, text: str, count: int = 1) -> None:
    lines = (line for line in process.stderr if text in line)
    assert len([*islice(lines, count)]) == count


@pytest.fixture(scope="module")
def at_position_1(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with three sessions."""
    path, shelf = tmp_path_factory.mktemp("state") / "sessions", tmp_path_factory.mktemp("shelf")
    shutil.copytree(repository / "gru" / "1", shelf / "gru" / "1")
    process = Process(shelf, "--state-file", str(path))
    for name in NAMES:
        httpx.post(f"{process.url}{SESSIONS}", json={"session_id": name})
        assert step(process.url, name) == 1
    assert end(process) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    return path


@pytest.fixture
def written(at_position_1: Path, path: Path) -> Path:
    """Return a copy of the file."""
    return Path(shutil.copy(at_position_1, path))


@pytest.fixture
def positions(serve: Serve, shelf: Path) -> Callable[[Path], list[int]]:
    """Run a server on this file, step each session, stop, and return the positions."""

    def call(path: Path) -> list[int]:
        running = serve(repository=shelf, state_file=path)
        found = [step(running.url, name) for name in NAMES]
        running.stop()
        return found

    return call


@pytest.mark.parametrize(("place", "reason"), [("nowhere/sessions", "No such file"), (".", "not a file")])
def test_unwritable_path_prevents_the_start(shelf: Path, place: str, reason: str) -> None:
    refused = Launched(
        *("--repository", str(shelf), "--port", "0", "--device", "cpu"), "--state-file", str(shelf / place)
    )
    _, log = refused.communicate(timeout=PATIENCE)
    assert refused.returncode == 1
    assert reason in json.loads(log.splitlines()[-1])["reason"]
    assert "Traceback" not in log


@pytest.mark.parametrize("fault", ["disk full", "folder removed"])
def test_sessions_that_cannot_be_written_are_counted(start: Callable[..., Process], path: Path, fault: str) -> None:
    process = start()
    for name in NAMES:
        httpx.post(f"{process.url}{SESSIONS}", json={"session_id": name})
        step(process.url, name)
    if fault == "disk full":
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (64, 64))
    else:
        shutil.rmtree(path.parent)
    assert end(process) == 1
    [line] = [line for line in process.log if line["event"] == "sessions lost"]
    assert (line["sessions"], line["level"], line["path"]) == (3, "critical", str(path))
    assert line["reason"]
    assert "Traceback" not in str(process.log)
    assert not path.parent.exists() or not [*path.parent.iterdir()]


#: A server that signals itself after one method of its state file and again at exit.
INTERRUPTED = """
import atexit, signal, sys
from unroll.cli import main
from unroll.service.store.state_file import StateFile

method, number = sys.argv[1:3]
original = getattr(StateFile, method)

def interrupted(self, *arguments):
    result = original(self, *arguments)
    signal.raise_signal(int(number))
    return result

setattr(StateFile, method, interrupted)
atexit.register(signal.raise_signal, signal.SIGTERM)
sys.exit(main(["serve", *sys.argv[3:]]))
"""


@pytest.mark.parametrize(
    ("method", "number"),
    [
        *product(["read", "remove"], [signal.SIGTERM, signal.SIGKILL]),
        *(
            pytest.param(*moment, marks=pytest.mark.long)
            for moment in [*product(["__init__", "write"], [signal.SIGTERM, signal.SIGKILL]), ("read", signal.SIGINT)]
        ),
    ],
)
def test_a_signal_at_any_moment_of_a_start_loses_nothing(
    written: Path, positions: Callable[[Path], list[int]], shelf: Path, method: str, number: int
) -> None:
    flags = ("--repository", str(shelf), "--port", "0", "--device", "cpu", "--state-file", str(written))
    process = Launched(method, str(number), *flags, script=INTERRUPTED)
    if method == "write":
        wait_for_lines(process, "running on")
        process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0), log
    assert "Traceback" not in log
    kept = not (
        method == "remove" and number == signal.SIGKILL
    )  # the sessions were already served, and a crash loses memory sessions
    assert positions(written) == [2 if kept else -1] * 3


def test_a_rescan_that_is_asked_for_during_a_start_follows_it(path: Path, shelf: Path) -> None:
    (shelf / "gru" / "2").mkdir()
    (shelf / "gru" / "2" / "manifest.json").touch()
    flags = ("--repository", str(shelf), "--port", "0", "--device", "cpu", "--state-file", str(path))
    process = Launched("read", str(signal.SIGHUP.value), *flags, script=INTERRUPTED)
    wait_for_lines(process, "bundle refused", 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


@pytest.mark.parametrize("damage", ["cut short", "a bit changed", "another version", "empty", "entries that are none"])
def test_a_damaged_file_is_set_aside(written: Path, positions: Callable[[Path], list[int]], damage: str) -> None:
    content = bytearray(written.read_bytes())
    if damage == "cut short":
        del content[-9:]
    elif damage == "a bit changed":
        content[len(content) // 2] ^= 1
    elif damage == "empty":
        content.clear()
    else:
        content[4 if damage == "another version" else 8] += 1  # the version; the number of sessions
        content[-16:] = checksum(bytes(content[:-16])).digest()
    aside = written.with_name("sessions.unreadable-1")
    aside.write_bytes(b"an earlier one")
    aside = written.with_name("sessions.unreadable-2")
    written.write_bytes(content)
    with capture_logs() as log:
        assert positions(written) == [-1] * 3
    [line] = [line for line in log if line["log_level"] == "error"]
    assert line["moved_to"] == str(aside)
    assert line["reason"]
    assert aside.read_bytes() == content


def test_two_servers_do_not_share_a_file(
    written: Path, serve: Serve, positions: Callable[[Path], list[int]], shelf: Path
) -> None:
    first = serve(repository=shelf, state_file=written)
    second = Launched(*("--repository", str(shelf), "--port", "0", "--device", "cpu"), "--state-file", str(written))
    _, log = second.communicate(timeout=PATIENCE)
    assert second.returncode == 1
    assert "another server uses the state file" in json.loads(log.splitlines()[-1])["reason"]
    assert [step(first.url, name) for name in NAMES] == [2, 2, 2]
    first.stop()
    assert positions(written) == [3, 3, 3]


def test_sessions_of_a_bundle_that_is_refused_wait_for_its_repair(
    serve: Serve, shelf: Path, repository: Path, path: Path
) -> None:
    shutil.copytree(repository / "lstm" / "1", shelf / "lstm" / "1")
    settings = {"repository": shelf, "state_file": path}
    running = serve(**settings)
    httpx.post(f"{running.url}{SESSIONS}", json={"session_id": "a"})
    assert step(running.url, "a") == 1
    running.stop()
    describe(shelf / "gru" / "1", format=2)
    running = serve(**settings)
    answer = httpx.get(f"{running.url}{SESSIONS}/a")
    assert (answer.status_code, answer.json()["code"]) == (503, "model_unavailable")
    running.stop()
    describe(shelf / "gru" / "1", format=1)
    running = serve(**settings)
    assert step(running.url, "a") == 2


def test_state_file_and_store_each_keep_their_sessions(
    written: Path, start: Callable[..., Process], tmp_path: Path
) -> None:
    store = ("--store", f"file://{tmp_path}/store")
    process = start(*store)
    assert httpx.post(f"{process.url}{SESSIONS}", json={"session_id": "stored"}).json()["durability"] == "stored"
    assert [step(process.url, name) for name in ("a", "stored")] == [2, 1]
    assert end(process) == 0
    process = start(*store)
    assert [step(process.url, name) for name in ("a", "stored")] == [3, 2]
    assert end(process) == 0


def test_a_state_file_can_be_imported_into_a_store(written: Path, start_process: StartProcess, tmp_path: Path) -> None:
    store = ("--store", f"file://{tmp_path}/store")
    assert cli.main(["sessions", "import", str(written), *store]) == 0
    process = start_process(*store)
    assert httpx.get(f"{process.url}{SESSIONS}/a").json()["durability"] == "stored"
    assert [step(process.url, name) for name in NAMES] == [2, 2, 2]
    assert end(process) == 0
