"""A server as a user starts it: `unroll serve` as a process."""

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from processes import Process

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
def serve() -> Serve:
    @contextmanager
    def running(repository: Path, *flags: str) -> Iterator[str]:
        process = Process(repository, *flags)
        rest = threading.Thread(target=process.log.extend, args=[process.popen.stderr])  # so that the pipe never fills
        rest.start()
        with process.popen:
            try:
                yield process.url
            finally:
                process.popen.terminate()
                rest.join()
        assert process.popen.returncode == 0, process.log

    return running


@pytest.fixture
def _curl() -> None:
    """Skip the test if curl, which pasted commands need, is not installed."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")


@pytest.fixture(scope="session")
def server(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of the example bundles that keeps its sessions in a folder, as `make run` does."""
    if not (EXAMPLES / "co2").exists():
        pytest.skip("the example bundles are missing: make bundles")
    with serve(EXAMPLES, "--store", tmp_path_factory.mktemp("sessions").as_uri()) as url:
        yield url
