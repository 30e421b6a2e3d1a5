"""Fixtures for all tests: a repository of small models, a CUDA stub and a Redis; and faster imports."""

import fcntl
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import structlog
from httpx._config import DEFAULT_TIMEOUT_CONFIG
from httpx._transports import default
from redis_server import RedisServer
from stub_cuda.child import Outcome, Stub
from waiting import PATIENCE

#: The type of the fixture `made_once`.
MadeOnce = Callable[[str, Callable[[Path], object]], Path]

# Hypothesis draws the same examples in every run; the long versions of tests draw new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
if "UNROLL_TEST_EXAMPLES" not in os.environ:
    hypothesis.settings.load_profile("repeatable")
gc.disable()  # enabled again once the tests are collected
os.environ.setdefault("OMP_NUM_THREADS", "1")  # child processes inherit it


def pytest_sessionstart(session: pytest.Session) -> None:
    """Import torch early, except in the xdist controller: it runs no tests, and its workers would wait for it."""
    if not session.config.pluginmanager.hasplugin("dsession"):
        import torch

        from conformance import onnx_registry

        torch.set_num_threads(1)
        onnx_registry.cache_registry()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that wait for processes first, in parallel with computing ones, and short tests last."""
    items.sort(key=lambda item: "faults" not in item.path.parts)


def pytest_collection_finish() -> None:
    """Make the garbage collector skip the half million imported objects, which live for the whole run."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _httpx_is_quick_and_patient() -> Iterator[None]:
    """Speed up httpx and extend its timeout. By default it loads all certificates per client and gives up after 5 s.

    It also tries to import sniffio several times per request. If that is absent, Python searches all folders each time.
    """
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("sniffio") is None:
            patch.setitem(sys.modules, "sniffio", None)
        patch.setattr(default, "create_ssl_context", cache(default.create_ssl_context))
        for phase in ("connect", "read", "write", "pool"):
            patch.setattr(DEFAULT_TIMEOUT_CONFIG, phase, PATIENCE)
        yield


@pytest.fixture(scope="session", autouse=True)
def _loggers_are_not_cached() -> Iterator[None]:
    """Disable the caching of loggers, which would keep the configuration of the command that used them first."""
    configure = structlog.configure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structlog, "configure", lambda **of: configure(**{**of, "cache_logger_on_first_use": False}))
        yield


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """Restore the log configuration, which a command run in this process changes for all later tests."""
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.configure(**before)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """`made_once(name, make)` returns a read-only folder that `make` fills once for all processes of a run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def call(name: str, make: Callable[[Path], object]) -> Path:
        path, done = folder / f"shared-{name}", folder / f"shared-{name}.done"
        with (folder / f"shared-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                path.mkdir()
                make(path)
                done.touch()
        return path

    return call


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the common models; `gru` has two versions with different weights."""
    from served_models import models

    return models.link(tmp_path_factory.mktemp("repository"), "lstm", "gru", "last", "whole", "tokens", "two")


@pytest.fixture(scope="session")
def run_with_stub(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """`run_with_stub(script, *arguments)` runs Python with `stub_cuda/` as the CUDA of onnxruntime-gpu.

    Computed results are meaningless; the outcome lists the CUDA calls.
    """
    if missing := Stub.missing():
        pytest.skip(missing)
    return Stub(tmp_path_factory.mktemp("stub_cuda")).run


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for the whole run; tests take `redis_server`."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis_server(redis_process: RedisServer) -> RedisServer:
    """An empty Redis. A test that kills or suspends Redis creates its own RedisServer."""
    redis_process.flush()
    return redis_process
