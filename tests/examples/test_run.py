"""What `make run` and `make stop` run, without make."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from redis_server import free_port
from waiting import PATIENCE

from unroll.examples import run as program

Refused = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory with a space in its name. A server still running in it is stopped at the end."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    program.main(["--stop"])


@pytest.fixture
def port() -> int:
    return free_port()


def test_detached_it_shows_the_demo_and_serves_until_stopped(
    folder: Path, port: int, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    command = [sys.executable, "-m", "unroll.examples.run", "--port", str(port), "--detach"]
    started = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert started.returncode == 0, started.stderr
    assert re.search(r"^Streamed = whole +yes, bit for bit$", started.stdout, re.MULTILINE)
    with urlopen(f"http://127.0.0.1:{port}/readyz") as ready:
        assert ready.status == 200
    pid = int((folder / ".run" / "server.pid").read_text())

    # The running server is the second one: the first was killed halfway, and its session continued.
    [(killed, successor)] = re.findall(r"process (\d+), is killed[^$]+by process (\d+), which", started.stdout)
    assert int(killed) != int(successor) == pid
    with pytest.raises(ProcessLookupError):
        os.kill(int(killed), 0)
    assert "same answer, not applied twice" in started.stdout
    assert re.search(r"^Killed = never killed +yes, bit for bit$", started.stdout, re.MULTILINE)

    assert program.main(["--port", str(port + 1), "--detach"]) == 1
    assert f"a server from this folder is already running (process {pid})" in capsys.readouterr().err

    assert program.main(["--stop"]) == 0
    assert f"stopped process {pid}" in capsys.readouterr().out
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    program.main(["--stop"])
    assert "no server from this folder is running" in capsys.readouterr().out


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """`refused("--port", ...)` runs the program in this process, expects status 1, and returns its output."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        assert program.main([*arguments, "--detach"]) == 1
        return capsys.readouterr().err

    return call


def test_unusable_folder_is_reported(refused: Refused, port: int, tmp_path: Path):
    (tmp_path / "file").touch()
    assert refused("--port", str(port), "--store", str(tmp_path / "file" / "sessions")) == (
        f"make run: the store {tmp_path / 'file' / 'sessions'} cannot be used: Not a directory\n"
        "Choose another folder, on a disk of this machine: make run STORE=/tmp/unroll\n"
    )


def test_occupied_port_is_reported(refused: Refused):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        says = refused("--port", str(port))
    assert f"port {port} is in use by another program; choose another: make run PORT={port + 1}" in says


def test_failed_server_start_shows_its_log(refused: Refused, port: int, tmp_path: Path):
    bundle = tmp_path / "bundles" / "broken" / "1"
    bundle.mkdir(parents=True)
    (bundle / "manifest.json").write_text("{}")
    says = refused("--port", str(port), "--repository", str(bundle.parents[1]))
    assert "the server exited with status 1" in says
    assert "broken" in says
