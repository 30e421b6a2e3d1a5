"""Replicas of one small model, in the test process or as child processes, with or without a shared store."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest
from faults.replica import Replica, tiny_repository
from faults.wires import Wires
from oracle import Oracle
from serving import Running
from waiting import PATIENCE

from unroll.service.core.clock import Clock
from unroll.service.settings import Settings

#: Starts this many servers in the test process, with settings by name.
Servers = Callable[..., list[Running]]
#: Creates this many replicas as processes, with flags, and does not start them.
Replicas = Callable[..., list[Replica]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_repository(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def oracle(tiny: Path) -> Oracle:
    return Oracle(tiny, "tiny")


@pytest.fixture
def servers(tiny: Path) -> Iterator[Servers]:
    running: list[Running] = []

    def start(count: int, **settings: object) -> list[Running]:
        running.extend(start_server(tiny, **settings) for _ in range(count))
        return running[-count:]

    yield start
    for server in running:
        server.stop()


@pytest.fixture
async def replicas(tiny: Path, tmp_path: Path) -> AsyncIterator[Replicas]:
    made: list[Replica] = []

    def make(count: int, *flags: str, environment: dict[str, str] | None = None) -> list[Replica]:
        added = [
            Replica(f"replica-{len(made) + i}", tiny, tmp_path, *flags, environment=environment) for i in range(count)
        ]
        made.extend(added)
        return added

    yield make
    for replica in made:
        replica.kill()


@pytest.fixture
async def wires() -> AsyncIterator[Wires]:
    wires = Wires("tiny", ("x", "y"), timeout=PATIENCE)
    yield wires
    wires.close()


def start_server(repository: Path, clock: Clock | None = None, **settings: object) -> Running:
    """Start a server and warm up its routes: FastAPI builds them at the first request, which is not thread-safe."""
    server = Running(Settings.model_validate({"repository": repository, **settings}), clock)
    path = f"{server.url}/v1/models/tiny/sessions"
    assert httpx.post(path, json={"session_id": "first"}).is_success
    for method, route in (("POST", "/fork"), ("GET", ""), ("GET", "/state"), ("PUT", "/state"), ("DELETE", "")):
        httpx.request(method, f"{path}/first{route}")
    return server


async def start(replicas: list[Replica]) -> None:
    await asyncio.gather(*(replica.start() for replica in replicas))
