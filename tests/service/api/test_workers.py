"""`--workers`: any worker serves any session, dead workers are replaced, and none outlives the supervisor."""

import asyncio
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
from processes import Launched, Process, StartProcess
from redis_server import RedisServer
from serving import RAW, Oracle, metric
from waiting import PATIENCE, reached, until
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from unroll.cli import main
from unroll.service import workers
from unroll.service.access.keys import new_key

NUMBER = 2
MODEL = "/v1/models/gru"

Background = Callable[..., Future]


@pytest.fixture
def started(start_process: StartProcess, redis_server: RedisServer, ports: list[int]) -> Process:
    flags = ("--workers", str(NUMBER), "--worker-port", str(ports[0]), "--store", redis_server.url)
    return start_process(*flags)


def ids(started: Process) -> list[int]:
    """Return the worker processes."""
    return [int(line["event"].split("[")[1].rstrip("]")) for line in started.log if "Started server" in line["event"]]


def version(port: int) -> str:
    """Return the metrics of a worker's model; empty if the worker does not answer."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}{MODEL}").json()["version"]
    except httpx.TransportError:
        return ""


def reply_to(send: Callable[[], httpx.Response]) -> httpx.Response:
    """Send, and retry if the connection was closed by the worker's death, in its queue, or by the idle timeout."""
    for _ in range(2):
        with suppress(httpx.NetworkError, httpx.RemoteProtocolError):
            return send()
    return send()


def test_one_port_and_several_processes(
    started: Process,
    ports: list[int],
    shelf: Path,
    repository: Path,
    oracle: Callable[..., Oracle],
    background: Background,
    rng: np.random.Generator,
) -> None:
    clients = [httpx.Client(base_url=started.url) for _ in range(64)]
    x = rng.standard_normal((8, 24, 3)).astype("<f4")
    for i in range(8):
        assert clients[i].post(f"{MODEL}/sessions", json={"session_id": f"s{i}"}).json()["durability"] == "stored"

    def steps(i: int) -> bytes:
        path, outputs = f"{MODEL}/sessions/s{i}/steps", b""
        for position in range(24):
            headers = {**RAW, "Unroll-Position": str(position)}
            content = x[i, position].tobytes()
            client = clients[(8 * position + i) % 64]
            outputs += reply_to(partial(client.post, path, content=content, headers=headers)).content
        return outputs

    for i, stepped in enumerate([background(steps, i) for i in range(8)]):
        assert stepped.result() == oracle("gru")(x[i]).tobytes()
    for client in clients:
        client.close()

    # Each worker serves its own metrics on its own port; the shared port merges all.
    served = [metric(httpx.get(f"http://127.0.0.1:{port}/metrics").text, "unroll_steps_total") for port in ports]
    assert sum(served) >= 8 * 24
    assert min(served) > 24
    together = httpx.get(f"{started.url}/metrics").text
    assert [metric(together, "unroll_steps_total", worker=worker) for worker in ("1", "2")] == served
    assert [metric(together, "unroll_worker_up", worker=worker) for worker in ("1", "2")] == [1, 1]
    kept = httpx.post(f"{started.url}{MODEL}/sessions", json={"durability": "memory"})
    assert (kept.status_code, kept.json()["code"]) == (422, "durability_unavailable")

    shutil.copytree(repository / "gru" / "2", shelf / ".coming")
    (shelf / ".coming").rename(shelf / "gru" / "2")
    started.popen.send_signal(signal.SIGHUP)
    until(lambda: [version(port) for port in ports] == ["2", "2"], "version 2")

    # One dies; the other worker or the replacement accepts connections.
    os.kill(ids(started)[0], signal.SIGKILL)
    answers = [background(reply_to, partial(httpx.get, f"{started.url}{MODEL}/sessions/s{i % 8}")) for i in range(32)]
    assert {answer.result().json()["position"] for answer in answers} == {24}
    until(lambda: version(ports[0]), "a successor")

    started.popen.send_signal(signal.SIGTERM)
    assert started.end() == 0
    kept = [line for line in started.log if line["event"] == "sessions"]
    assert {line["worker"] for line in kept} == {1}, "one worker says it for all"
    assert kept[0]["survive"] == "the end of any server, and a crash of Redis except for the last second"
    assert not any(version(port) for port in ports)
    ended = [line for line in started.log if line["event"] == "worker exited"]
    assert [(line["worker"], line["status"]) for line in ended] == [(1, -signal.SIGKILL)]


def test_the_workers_end_with_their_supervisor(
    start_process: StartProcess, ports: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    flags = ("--workers", str(NUMBER), "--worker-port", str(ports[0]), "--store", f"file://{tmp_path}/store")
    started = start_process(*flags)
    [folder] = tmp_path.glob("unroll-*")
    started.popen.kill()
    started.popen.wait()
    until(lambda: not any(version(port) for port in ports), "the end of the workers")
    until(lambda: not folder.exists(), "they leave nothing behind")


def test_a_worker_that_cannot_start_ends_all(tmp_path: Path, redis_server: RedisServer) -> None:
    flags = ("--repository", str(tmp_path), "--port", "0", "--device", "cpu", "--store", redis_server.url)
    refused = Launched(*flags, "--workers", "2")
    _, log = refused.communicate(timeout=PATIENCE)
    assert refused.returncode == 1
    assert log.count("holds no bundle") == 1
    assert "Traceback" not in log


def test_port_shared_by_another_process_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    """Connections to the other process must not reach these workers."""
    with workers.bind("127.0.0.1", 0, shared=True) as others:
        assert workers.supervise("127.0.0.1", others.getsockname()[1], 2) == 1
    assert "in use" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--workers", "2"), "--store"),
        (("--workers", "2", "--store", "redis://localhost", "--durability", "memory"), "--durability memory"),
        (("--workers", "2", "--store", "redis://localhost", "--state-file", "sessions"), "state file"),
        (("--workers", "0"), "--workers"),
        (("--worker-port", "9001"), "--workers"),
    ],
)
def test_conflicting_settings_are_refused(flags: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--repository", ".", *flags]) == 2
    assert why in capsys.readouterr().err


#: A worker that follows a plan, one word per start, repeating the last: report that it serves, then exit with a status
#: or a signal, or keep running. Each start appends a line to a file.
PLANNED = """
import os, signal, socket, sys
number, descriptors, *_ = os.environ["UNROLL_WORKER"].split()
listener, link = descriptors.split(",")
with open(sys.argv[1], "a+") as starts:
    print(number, socket.socket(fileno=int(listener)).getsockname()[1], file=starts, flush=True)
    starts.seek(0)
    started = len(starts.readlines())
plan = sys.argv[2].split()
word = plan[min(started, len(plan)) - 1]
if word.startswith("serve"):
    socket.socket(fileno=int(link)).send(b"1")
act = word.removeprefix("serve-")
if act.isdigit():
    sys.exit(int(act))
if act != "stay":
    os.kill(os.getpid(), getattr(signal, act))
signal.pause()
"""


class Planned:
    """A supervisor of one worker that follows a plan; pauses are shortened to a thousandth."""

    def __init__(self, plan: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._starts = folder / "starts"
        self._starts.touch()
        self.wanted = len(plan.split())
        self.listener = workers.bind("127.0.0.1", 0, shared=True)
        self.port = self.listener.getsockname()[1]
        monkeypatch.setattr(sys, "orig_argv", ["python", "-c", PLANNED, str(self._starts), plan])
        monkeypatch.setattr(workers, "_PAUSES", tuple(pause / 1000 for pause in workers._PAUSES))
        self.supervisor = workers._Supervisor("127.0.0.1", self.port, [self.listener], "http", [], str(folder))

    @property
    def starts(self) -> list[str]:
        return self._starts.read_text().splitlines()

    async def run(self) -> int:
        """Stop the supervisor once the worker reaches the end of its plan; return the exit status."""
        running = asyncio.create_task(self.supervisor.run())
        await reached(lambda: running.done() or len(self.starts) == self.wanted, "the end of the plan")
        self.supervisor._stop()
        return await running


async def test_worker_that_keeps_dying_is_restarted_after_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker restarts on the same port after a pause; the port is not reserved during the pause."""
    planned = Planned("serve-3 serve-3 serve-3 serve-stay", tmp_path, monkeypatch)
    assert await planned.run() == 0
    assert planned.listener.fileno() == -1
    assert set(planned.starts) == {f"1 {planned.port}"}


@pytest.mark.parametrize(
    ("plan", "pauses"),
    [
        ("serve-SIGKILL " * 7 + "serve-stay", [1] * 7),
        ("serve-SIGKILL SIGKILL 0 SIGTERM SIGKILL serve-stay", [1] * 5),
        ("serve-SIGSEGV " * 4 + "serve-stay", [1] * 4),
        ("SIGKILL SIGKILL SIGKILL serve-stay", [1] * 3),
        ("serve-1 1 1 1 1 1 serve-stay", [1, 2, 4, 8, 15, 15]),
    ],
    ids=["killed-while-it-serves", "killed-while-it-starts", "crashed", "killed-before-it-ever-served", "cannot-start"],
)
async def test_pauses_grow_only_for_a_worker_that_cannot_start(
    plan: str, pauses: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    planned = Planned(plan, tmp_path, monkeypatch)
    assert await planned.run() == 0
    assert len(planned.starts) == planned.wanted
    paused = re.findall(r"restarts_in\W+?([\d.]+)", re.sub(r"\x1b\[[0-9;]*m", "", capfd.readouterr().out))
    assert [round(float(each) * 1000) for each in paused] == pauses


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ("3 stay", "it exited with status 3; fix the problem in its last log line, and start again"),
        ("SIGSEGV stay", "it was killed by signal 11, Segmentation fault; run `unroll doctor`"),
    ],
)
async def test_a_first_start_that_fails_by_itself_ends_all_with_a_line(
    plan: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    planned = Planned(plan, tmp_path, monkeypatch)
    assert await planned.run() == 1
    assert len(planned.starts) == 1
    [line] = [line for line in capfd.readouterr().out.splitlines() if "not started" in line]
    assert f"worker 1 did not start serving, so all workers stop: {why}" in line


@pytest.mark.parametrize("served", [False, True])
async def test_a_worker_that_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], served: bool
) -> None:
    """Out of processes or descriptors: a failed first start ends all with one line; a later start is retried."""
    failures = iter([False] * served + [True, True, False])
    planned = Planned("serve-3 serve-3 serve-3 serve-stay" if served else "serve-stay", tmp_path, monkeypatch)
    start = asyncio.create_subprocess_exec

    async def scarce(*arguments: str, **options: object) -> object:
        if next(failures, False):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return await start(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", scarce)
    assert await planned.run() == (0 if served else 1)
    assert capfd.readouterr().out.count("Resource temporarily unavailable") == (2 if served else 1)


def test_keys_and_tickets_are_the_same_to_every_worker(
    start_process: StartProcess, ports: list[int], tmp_path: Path
) -> None:
    (leaked, first), (kept, second) = (new_key(name, "acme", ["infer", "metrics"]) for name in ("leaked", "kept"))
    keys = tmp_path / "keys.toml"
    keys.write_text(first + second)
    flags = ("--workers", str(NUMBER), "--worker-port", str(ports[0]), "--store", f"file://{tmp_path}/store")
    started = start_process(*flags, "--keys", str(keys))
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    ticket = httpx.post(f"{urls[0]}/v1/tickets", headers={"X-API-Key": kept}).json()["ticket"]
    for url in urls:
        protocols = [Subprotocol("unroll.v1"), Subprotocol(f"unroll.ticket.{ticket}")]
        with connect(url.replace("http", "ws") + f"{MODEL}/stream", subprotocols=protocols):
            pass
    assert httpx.get(f"{started.url}/metrics").status_code == 401
    text = httpx.get(f"{started.url}/metrics", headers={"Authorization": f"Bearer {kept}"}).text
    assert [metric(text, "unroll_worker_up", worker=worker) for worker in ("1", "2")] == [1, 1]

    def statuses(key: str) -> list[int]:
        return [httpx.get(f"{url}/v1/models", headers={"X-API-Key": key}).status_code for url in urls]

    assert statuses(leaked) == [200, 200]
    keys.write_text(second)
    started.popen.send_signal(signal.SIGHUP)
    until(lambda: statuses(leaked) == [401, 401], "the key is removed in every worker")
    assert statuses(kept) == [200, 200]
    started.popen.send_signal(signal.SIGTERM)
    assert started.end() == 0


def test_the_operators_port_speaks_for_all_workers(
    start_process: StartProcess, ports: list[int], tmp_path: Path
) -> None:
    flags = ("--workers", str(NUMBER), "--worker-port", str(ports[0]), "--store", f"file://{tmp_path}/store")
    started = start_process(*flags, "--admin", "--admin-port", "0", "--allowed-hosts", '["models.example.com"]')
    [port] = [line["port"] for line in started.log if line["event"] == "operator's port"]
    urls = [f"http://127.0.0.1:{own}" for own in ports[:NUMBER]]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as operator:
        up = operator.get("/metrics").text
        assert [metric(up, "unroll_worker_up", worker=worker) for worker in ("1", "2")] == [1, 1]
        assert httpx.get(f"{started.url}/metrics").status_code == 404
        for verb, status in (("unload", 404), ("load", 200)):
            assert operator.post(f"/v2/repository/models/gru/{verb}").status_code == 200
            assert [httpx.get(url + MODEL).status_code for url in urls] == [status, status]
        refused = operator.post("/v2/repository/models/none%2F/load")
        assert (refused.status_code, refused.json()["code"]) == (404, "model_unknown")
        httpx.post(f"{urls[0]}{MODEL}/sessions", json={"session_id": "s"}).raise_for_status()
        assert [one["session_id"] for one in operator.get("/v1/admin/sessions").json()["sessions"]] == ["s"]
        assert operator.put("/v1/admin/log-level", json={"level": "loud"}).json()["code"] == "malformed_request"
        assert operator.put("/v1/admin/log-level", json={"level": "error"}).json() == {"level": "error"}
        assert operator.post("/v1/admin/drain").json() == {"ready": False}
        assert [httpx.get(f"{url}/readyz").status_code for url in urls] == [503, 503]
    started.popen.send_signal(signal.SIGTERM)
    assert started.end() == 0
    assert "draining" not in {line["event"] for line in started.log}, "a line of level info"
