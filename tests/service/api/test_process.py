"""`unroll serve` as a process: SIGHUP, SIGTERM, and failed starts."""

import json
import re
import shutil
import signal
import socket
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import httpx
import numpy as np
import pytest
import wire
from processes import Launched, Process, StartProcess, spawn
from serving import Oracle, metric, raw_steps
from waiting import PATIENCE, until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from unroll.service.access.keys import new_key


@pytest.fixture
def process(start_process: StartProcess) -> Process:
    return start_process("--drain-timeout", str(PATIENCE), start=spawn)


def test_signals(
    process: Process,
    shelf: Path,
    repository: Path,
    background: Callable[..., Future],
    oracle: Callable[..., Oracle],
    rng: np.random.Generator,
) -> None:
    x = rng.standard_normal((4, 3)).astype(np.float32)
    with httpx.Client(base_url=process.url) as client:
        session = f"/v1/models/gru/sessions/{client.post('/v1/models/gru/sessions').json()['session_id']}"
        first = client.post(f"{session}/steps", content=x[:2].tobytes(), headers=raw_steps(x[:2])).content
        shutil.copytree(repository / "gru" / "2", shelf / ".coming")
        (shelf / ".coming").rename(shelf / "gru" / "2")
        process.popen.send_signal(signal.SIGHUP)
        until(lambda: client.get("/v1/models/gru").json()["version"] == "2", "version 2")
        second = client.post(f"{session}/steps", content=x[2:].tobytes(), headers=raw_steps(x[2:])).content
        assert np.array_equal(np.frombuffer(first + second, "<f4").reshape(-1, 2), oracle("gru", "1")(x))

        work = np.tile(x, (128, 500, 1))  # long enough to be running when the signal arrives
        running = background(wire.infer, client, "gru", work)
        until(lambda: metric(client.get("/metrics").text, "unroll_chunks_in_flight") > 0, "work in flight")
        process.popen.send_signal(signal.SIGTERM)
        assert np.array_equal(wire.outputs(running.result())[1]["y"][5], oracle("gru", "2")(work[0]))
    assert process.end() == 0
    assert not [line for line in process.log if line["level"] not in ("info", "debug")]
    (kept,) = [line for line in process.log if line["event"] == "sessions"]
    assert (kept["durability"], kept["where"]) == ("memory", "memory")
    assert kept["survive"] == "nothing; use --store to keep them"


def test_the_log_has_no_headers_at_any_level(start_process: StartProcess) -> None:
    process = start_process("--log-level", "debug")
    headers = {"Authorization": "Bearer secret"}
    with httpx.Client(base_url=process.url, headers=headers) as client:
        assert client.post("/v1/models/gru/sessions").status_code == 201
        assert client.post("/v1/models/gru/sequences", content=b"?").status_code == 415
    with connect(f"{process.url.replace('http', 'ws')}/v1/models/gru/stream", additional_headers=headers) as stream:
        stream.send("?")
        assert stream.recv()
    process.popen.terminate()
    assert process.end() == 0
    assert not [line for line in process.log if "secret" in json.dumps(line)]
    requests = [line for line in process.log if line["event"] == "request"]
    assert [line["code"] for line in requests] == ["unsupported_media_type", "malformed_request"]


def test_a_drain(start_process: StartProcess) -> None:
    """The server turns unready at once; a second signal cuts the delay short and shuts it down cleanly."""
    process = start_process("--drain-delay", "1000")
    stream = connect(f"{process.url.replace('http', 'ws')}/v1/models/gru/stream")
    with httpx.Client(base_url=process.url) as client, stream:
        stream.send(json.dumps({"op": "open", "sessions": [{"handle": 5, "session_id": "s"}]}))
        assert "error" not in json.loads(stream.recv())["sessions"][0]
        process.popen.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").status_code == 503, "not ready")
        assert client.get("/v1/models/gru/sessions/s").status_code == 200
        assert client.post("/v1/models/gru/sessions").json()["code"] == "draining"
        until(lambda: process.popen.send_signal(signal.SIGTERM) or process.popen.poll() is not None, "the end")
        told = json.loads(stream.recv())
        assert told == {"op": "closing", "sessions": [{"handle": 5, "session_id": "s", "position": 0}]}
        with pytest.raises(ConnectionClosed) as closed:
            stream.recv()
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1012
    assert process.end() == 0


#: A server with its keys replaced, and a SIGHUP sent, after it read them and before it serves.
REVOKING = """
import os, signal, sys
from unroll.cli import main
from unroll.service import app

build = app.build

def build_slowly(*arguments):
    built = build(*arguments)
    keys = sys.argv[sys.argv.index("--keys") + 1]
    os.replace(keys + ".new", keys)
    os.kill(os.getpid(), signal.SIGHUP)
    return built

app.build = build_slowly
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def test_a_key_that_is_removed_during_the_start_is_refused(start_process: StartProcess, tmp_path: Path) -> None:
    (leaked, first), (kept, second) = new_key("leaked", "acme", ["infer"]), new_key("kept", "acme", ["infer"])
    keys = tmp_path / "keys.toml"
    keys.write_text(first + second)
    keys.with_suffix(".toml.new").write_text(second)
    process = start_process("--keys", str(keys), script=REVOKING)
    with httpx.Client(base_url=process.url) as client:
        until(lambda: client.get("/v1/models", headers={"X-API-Key": leaked}).status_code == 401, "the key is refused")
        assert client.get("/v1/models", headers={"X-API-Key": kept}).status_code == 200
    process.popen.terminate()
    assert process.end() == 0


#: A server with a loop that fails on its first batch.
CRASHING = """
import sys
from unroll.cli import main
from unroll.service.scheduler.loop import Loop

async def crash(self, batch):
    raise RuntimeError("a crash")

Loop._begin = crash
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def test_a_crash(start_process: StartProcess) -> None:
    process = start_process(script=CRASHING)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{process.url}/v1/models/gru/sequences", json={"inputs": [[[1.0, 2.0, 3.0]]]})
    assert process.end() == 1
    assert "a crash" in next(str(line) for line in process.log if line["event"] == "crashed")


#: A server with a shutdown that fails at its last step.
UNSTOPPABLE = """
import sys
from unroll.service.models.repository import ModelRepository
from unroll.cli import main

def fail(self):
    raise RuntimeError("a failure at the end")

ModelRepository.shut_down = fail
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def test_failed_shutdown_has_a_failure_status(start_process: StartProcess) -> None:
    process = start_process(script=UNSTOPPABLE)
    process.popen.send_signal(signal.SIGTERM)
    assert process.end() == 1
    assert "a failure at the end" in str(process.log)


#: The server on a system without Linux's scheduler calls and /proc, such as macOS.
NOT_LINUX = """
import io, os, sys
del os.sched_getaffinity, os.sched_setaffinity
original = io.open

def without_proc(file, *args, **options):
    if str(file).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return original(file, *args, **options)

io.open = without_proc
from unroll.cli import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def test_a_system_other_than_linux(start_process: StartProcess) -> None:
    process = start_process(start=spawn, script=NOT_LINUX)
    reply = httpx.post(f"{process.url}/v1/models/gru/sequences", json={"inputs": [[[1.0, 2.0, 3.0]]]})
    assert reply.status_code == 200, reply.text
    process.popen.send_signal(signal.SIGTERM)
    assert process.end() == 0


#: Starts the server with each list of flags in one process; writes the exit statuses to stderr, next to the log.
STARTS = """
import json, sys
from unroll.cli import main
for flags in json.loads(sys.argv[1]):
    try:
        status = main(["serve", *flags])
    except SystemExit as end:
        status = end.code
    print("ended", status, file=sys.stderr, flush=True)
"""

#: Flags of failing starts, and the reason.
FAILING = {
    ("--repository", "tests/service"): "holds no bundle",
    ("--repository", "nowhere"): "the repository cannot be read: [Errno 2] No such file",
    ("--repository", "README.md"): "the repository cannot be read: [Errno 20] Not a directory",
    ("--device", "tpu"): "use cpu, auto, or GPUs",
    ("--device", "cuda:99"): "cuda:99 was requested, but",
    ("--auth", "none", "--host", "203.0.113.1"): "cannot listen on 203.0.113.1, port 0: ",
    ("--auth", "none", "--host", "no.such.host.invalid"): "cannot listen on no.such.host.invalid, port 0: ",
}


#: Invalid flags.
WRONG = [(), ("--repository", ".", "--port", "abc"), ("--bogus",)]


@pytest.fixture(scope="module")
def failed_starts(few: Path) -> dict[tuple[str, ...], tuple[int, list[str]]]:
    """Return the exit status and the stderr lines for each list of flags."""
    usual = ("--repository", str(few), "--port", "0", "--device", "cpu")
    starts = {flags: usual + flags for flags in FAILING} | {flags: flags for flags in WRONG}
    process = Launched(json.dumps([*starts.values()]), script=STARTS)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    parts = re.split(r"^ended (\d)\n", said, flags=re.MULTILINE)
    return dict(zip(starts, zip(map(int, parts[1::2]), map(str.splitlines, parts[:-1:2]), strict=True), strict=True))


@pytest.mark.parametrize("flags", FAILING)
def test_a_start_that_fails_says_why_in_its_last_line(
    failed_starts: dict[tuple[str, ...], tuple[int, list[str]]], flags: tuple[str, str]
) -> None:
    status, log = failed_starts[flags]
    assert status == 1
    last = json.loads(log[-1])
    assert (last["event"], last["level"]) == ("not started", "error")
    assert FAILING[flags] in last["reason"]
    assert "Traceback" not in str(log)


@pytest.mark.parametrize("flags", WRONG)
def test_flags_that_are_wrong_end_with_a_line_each(
    failed_starts: dict[tuple[str, ...], tuple[int, list[str]]], flags: tuple[str, ...]
) -> None:
    status, said = failed_starts[flags]
    assert status == 2
    assert "unroll serve" in said[0]
    assert "Traceback" not in str(said)


def test_a_port_that_is_taken_is_noticed_before_the_models_are_loaded(shelf: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused = Launched("--repository", str(shelf), "--port", str(port), "--device", "cpu")
        _, log = refused.communicate(timeout=PATIENCE)
    assert refused.returncode == 1
    [line] = [json.loads(line) for line in log.splitlines()]
    assert line["reason"] == f"cannot listen on 127.0.0.1, port {port}: Address already in use; see --host and --port"


#: The server without standard descriptors; prints their targets after the start.
DETACHED = """
import os, sys
from unroll import cli
from unroll.service import serve

build, log = serve.app.build, os.dup(2)
os.closerange(0, 3)

def told(*arguments, **options):
    os.write(log, str([os.readlink(f"/proc/self/fd/{n}") for n in range(3)]).encode())
    raise SystemExit(0)

serve.app.build = told
cli.main(["serve", *sys.argv[1:]])
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_closed_standard_descriptors_are_not_taken_by_sockets_or_files(shelf: Path) -> None:
    process = Launched("--repository", str(shelf), "--port", "0", script=DETACHED)
    _, log = process.communicate(timeout=PATIENCE)
    assert log == str(["/dev/null"] * 3)
