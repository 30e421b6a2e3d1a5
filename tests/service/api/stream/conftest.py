"""Servers and connections for the tests of streams."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fake_link import FakeLink, Wire
from serving import HeldEngine, Oracle, Running
from streams import Client, Dial, Plain
from waiting import reached, until

from unroll.service import app
from unroll.service.api.stream.connection import Connection
from unroll.service.settings import Settings

Oracles = Callable[..., Oracle]


@pytest.fixture(scope="session")
def plain(repository: Path) -> Iterator[Running]:
    running = Plain(Settings(repository=repository))
    yield running
    running.stop()
    assert not running.server.streams


@pytest.fixture(params=["direct", "plain"])
def any_server(request: pytest.FixtureRequest) -> Running:
    return request.getfixturevalue("server" if request.param == "direct" else "plain")


@pytest.fixture
def dial(server: Running, oracle: Oracles) -> Iterator[Dial]:
    """`dial(name="lstm", model=…, running=…)` connects; after the test, closes all connections and checks for leaks."""
    clients: list[tuple[Running, Client]] = []

    def call(name: str = "lstm", *, running: Running = server, **options: object) -> Client:
        clients.append((running, Client(running, oracle(name).manifest, **options)))  # type: ignore[arg-type]
        return clients[-1][1]

    yield call
    for _, client in clients:
        with suppress(OSError):
            client.socket.close()
    until(lambda: not any(running.server.streams for running, _ in clients), "the end of the streams")


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((12, 3)).astype("<f4")


@pytest.fixture
async def wire(repository: Path, tmp_path: Path) -> AsyncIterator[Wire]:
    shutil.copytree(repository / "lstm", tmp_path / "lstm")
    _, server = app.build(Settings(repository=tmp_path))
    (model,) = server.models
    running = asyncio.create_task(server.repository.run())
    link = FakeLink()
    connection = Connection(server, "", "lstm", link, asyncio.get_running_loop().call_soon)
    assert server.streams == {connection}
    with HeldEngine(model.loop) as engine:
        yield Wire(connection, server, model.manifest, link.sent, link.flow, engine)
        connection.close()
        assert not server.streams
    await reached(lambda: not model.scheduler.in_flight)
    model.scheduler.check_invariants()
    running.cancel()
    await asyncio.wait([running])
