"""Servers for the API tests: a shared one with default settings, and others on request."""

import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from processes import Process, StartProcess
from raw_http import Wire
from redis_server import free_port
from served_models import models
from serving import Oracle, Running, Serve

from unroll.service.core.clock import Clock
from unroll.service.settings import Settings

#: Settings of every server in these tests.
MOST_WORKERS = 2


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The common repository and the model `hot`."""
    names = ("lstm", "gru", "last", "whole", "tokens", "two", "hot")
    return models.link(tmp_path_factory.mktemp("repository"), *names)


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models most tests use. A server of all models takes three times as long to start."""
    return models.link(tmp_path_factory.mktemp("few"), "lstm", "gru", "hot")


@pytest.fixture
def serve(few: Path) -> Iterator[Serve]:
    """`serve(clock=None, repository=…, **settings)` starts a server; it is stopped and checked after the test."""
    running: list[Running] = []

    def start(clock: Clock | None = None, **settings: object) -> Running:
        running.append(Running(Settings.model_validate({"repository": few, **settings}), clock))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[Running]:
    """A shared server with the default settings. Tests must not depend on sessions that other tests leave."""
    running = Running(Settings(repository=repository))
    yield running
    running.stop()


@pytest.fixture
def wire(server: Running) -> Iterator[Wire]:
    wire = Wire(server.port)
    yield wire
    wire.socket.close()


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


@pytest.fixture(scope="session")
def oracle(repository: Path) -> Callable[..., Oracle]:
    """`oracle(name, version="1")`: the model as onnxruntime alone runs it."""
    return lambda name, version="1": Oracle(repository, name, version)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def background() -> Iterator[Callable[..., Future]]:
    """`background(call, *args, **kwargs)` runs a blocking call in a thread and returns its Future."""
    with ThreadPoolExecutor(16) as threads:
        yield threads.submit


@pytest.fixture
def shelf(repository: Path, tmp_path: Path) -> Path:
    shutil.copytree(repository / "gru" / "1", tmp_path / "gru" / "1")
    return tmp_path


@pytest.fixture
def start_process(shelf: Path) -> Iterator[StartProcess]:
    """`start_process(*flags, start=…, script=…)`"""
    started: list[Process] = []

    def call(*flags: str, **options: Any) -> Process:
        started.append(Process(shelf, *flags, **options))
        return started[-1]

    yield call
    for process in started:
        with process.popen:
            process.popen.kill()


@pytest.fixture
def ports() -> list[int]:
    """Find consecutive free ports for the per-worker ports."""
    while True:
        first = free_port()
        ports = [first + i for i in range(MOST_WORKERS)]
        try:
            for port in ports:
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return ports
