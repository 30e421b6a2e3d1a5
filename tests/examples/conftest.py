"""A server as a user starts it: `unroll serve` as a child process."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "repository"

#: `with serve(repository) as url:`
Serve = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment variables of a shell with the virtual environment activated."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src")}


@pytest.fixture(scope="session")
def serve(environment: dict[str, str]) -> Serve:
    @contextmanager
    def running(repository: Path, *flags: str) -> Iterator[str]:
        command = [sys.executable, "-m", "unroll", "serve", "--repository", str(repository), "--port", "0", *flags]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            log: list[str] = []
            for line in process.stderr:
                log.append(line)
                if "Uvicorn running on" in line:
                    break
            else:
                pytest.fail("the server did not start:\n" + "".join(log))
            url = json.loads(log[-1])["event"].split()[3]
            rest = threading.Thread(target=log.extend, args=[process.stderr])  # so that the pipe never fills
            rest.start()
            yield url
            process.terminate()
            rest.join()
        assert process.returncode == 0, "".join(log)

    return running


@pytest.fixture
def _curl() -> None:
    """What pasted commands need."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")


@pytest.fixture(scope="session")
def server(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of the example bundles, with its sessions in a folder, like that of `make run`."""
    if not (EXAMPLES / "co2").exists():
        pytest.skip("the example bundles are missing: make bundles")
    with serve(EXAMPLES, "--store", tmp_path_factory.mktemp("sessions").as_uri()) as url:
        yield url
