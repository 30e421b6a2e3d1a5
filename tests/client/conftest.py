"""One server for all client tests, and both clients behind one interface."""

import asyncio
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blocking import Blocking
from served_models import models
from serving import Oracle, Running
from waiting import PATIENCE

from unroll.client import AsyncClient, Client
from unroll.service.settings import Settings

#: Makes a client of either kind for a URL.
MakeClient = Callable[..., Any]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The common models, and one with static inputs."""
    names = ("lstm", "gru", "last", "whole", "tokens", "two", "voices")
    return models.link(tmp_path_factory.mktemp("served"), *names)


@pytest.fixture(scope="session")
def server(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    store = f"file://{tmp_path_factory.mktemp('store')}"
    keys = ("a key of the tests",)
    running = Running(Settings(repository=served, store=store, durability="memory", snapshot_keys=keys))  # type: ignore[arg-type]
    yield running
    running.stop()


@pytest.fixture(params=["sync", "async"])
def make_client(request: pytest.FixtureRequest) -> Iterator[MakeClient]:
    """`make_client(url, **options)` for each kind of client; clients are closed after the test."""
    with ExitStack() as ending:
        runner = ending.enter_context(asyncio.Runner())

        def make(url: str, **options: Any) -> Any:
            made = Client(url, **options) if request.param == "sync" else Blocking(AsyncClient(url, **options), runner)
            return ending.enter_context(made)  # type: ignore[arg-type]

        yield make


@pytest.fixture
def client(make_client: MakeClient, server: Running) -> Any:
    return make_client(server.url)


@pytest.fixture(scope="session")
def node() -> list[str]:
    """The command that runs a Node with WebSockets."""
    command = shutil.which("node")
    if command is None:
        pytest.skip("node is not installed")
    flags = ["--no-warnings", "--experimental-websocket"]
    probe = [command, *flags, "-e", "new WebSocket"]
    found = subprocess.run(probe, capture_output=True, text=True, timeout=PATIENCE).stderr
    if "ReferenceError" in found or "bad option" in found:
        pytest.skip("this node has no WebSocket")
    return [command, *flags]


@pytest.fixture(scope="session")
def oracle(served: Path) -> Callable[[str], Oracle]:
    return lambda name: Oracle(served, name)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)
