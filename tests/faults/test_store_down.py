"""An unavailable store as clients see it: durable sessions wait, memory sessions continue, no answer is wrong."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from faults.conftest import Replicas, Servers
from faults.crowd import Crowd
from faults.proxy import Fault, FaultProxy
from faults.replica import is_ready
from faults.wires import WAYS, Broken, Reply, Stream, Wires
from oracle import Oracle
from redis.exceptions import ResponseError
from redis_server import RedisServer
from waiting import LoopTime, reached

#: Seconds within which a client learns that the store is down.
SOON = 1.0
STEPS = np.random.default_rng(8).standard_normal((40, 2)).astype(np.float32)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.kill()


# ── store failures; each restores the store with its data ────────────────────────────────────────


@asynccontextmanager
async def stopped(redis: RedisServer, proxy: FaultProxy) -> AsyncIterator[None]:
    redis.pause()
    yield
    redis.resume()


@asynccontextmanager
async def killed(redis: RedisServer, proxy: FaultProxy) -> AsyncIterator[None]:
    redis.kill()
    yield
    redis.start()


@asynccontextmanager
async def refusing(redis: RedisServer, proxy: FaultProxy) -> AsyncIterator[None]:
    await proxy.refuse()
    yield
    await proxy.accept()


@asynccontextmanager
async def silent(redis: RedisServer, proxy: FaultProxy) -> AsyncIterator[None]:
    proxy.draw = lambda: Fault.SILENCE
    yield
    proxy.draw = lambda: Fault.NONE


@asynccontextmanager
async def full(redis: RedisServer, proxy: FaultProxy) -> AsyncIterator[None]:
    redis.client.config_set("maxmemory-policy", "noeviction")
    redis.client.config_set("maxmemory", "1kb")
    yield
    redis.client.config_set("maxmemory", "0")


def fill(redis: RedisServer) -> NoReturn:
    while True:
        redis.client.set("more", bytes(1024))


@asynccontextmanager
async def without_room_on_disk(redis: RedisServer, proxy: FaultProxy) -> AsyncIterator[None]:
    """Redis refuses writes after a failed write to its file."""
    ballast = redis.folder / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(ResponseError, match="MISCONF"):
        fill(redis)
    yield
    ballast.unlink()


class Session:
    """A session that is stepped once per call; a refused step is sent again by the next call."""

    def __init__(self, wires: Wires, port: int, name: str) -> None:
        self.wires, self.port, self.name, self.position = wires, port, name, 0
        self.outputs = b""
        self.streams: list[Stream] = []

    async def open(self, durability: str) -> Reply:
        return await self.wires.call(
            "POST", self.port, "/sessions", {"session_id": self.name, "durability": durability}
        )

    async def step(self, way: str = "raw") -> Reply:
        x = STEPS[self.position : self.position + 1]
        if way == "stream":
            self.streams.append(Stream(self.wires, self.port, self.name))
            reply = await self.streams[-1].send(x, self.position)
            self.streams[-1].close()
        else:
            reply = await self.wires.send(way, self.port, self.name, x, self.position)
        if reply.status == 200:
            self.outputs += reply.outputs
            self.position += 1
            assert reply.position == self.position
        return reply


Outage = Callable[[RedisServer, FaultProxy], AbstractAsyncContextManager[None]]


@pytest.mark.parametrize("outage", [stopped, killed, refusing, silent, full])
async def test_sessions_survive_an_outage(
    redis: RedisServer, servers: Servers, wires: Wires, oracle: Oracle, outage: Outage
) -> None:
    await check(redis, servers, wires, oracle, outage)


async def test_sessions_survive_a_full_disk(servers: Servers, wires: Wires, oracle: Oracle, small_disk: Path) -> None:
    redis = RedisServer(small_disk / "redis")
    redis.start()
    try:
        await check(redis, servers, wires, oracle, without_room_on_disk)
    finally:
        redis.kill()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


async def check(redis: RedisServer, servers: Servers, wires: Wires, oracle: Oracle, outage: Outage) -> None:
    async with FaultProxy(redis.port) as proxy:
        # In a thread, because replicas connect to the store at start, and the proxy runs here.
        here, there = await asyncio.to_thread(servers, 2, store=f"redis://127.0.0.1:{proxy.port}/0")
        durable, volatile = Session(wires, here.port, "durable"), Session(wires, here.port, "volatile")
        assert (await durable.open("redis")).document["durability"] == "stored"
        assert (await volatile.open("memory")).document["durability"] == "memory"
        for way in WAYS:
            assert (await durable.step(way)).status == 200
            assert (await volatile.step(way)).status == 200
        async with outage(redis, proxy):
            for way in WAYS:
                async with LoopTime() as took:
                    reply = await durable.step(way)
                assert took.seconds < SOON, way
                assert (reply.status, reply.code) == (0 if way == "stream" else 503, "store_unavailable"), way
                assert reply.retry_after
                assert (await volatile.step(way)).status == 200
            assert (await Session(wires, here.port, "new").open("redis")).code == "store_unavailable"
            assert (await wires.ask(here.port, "GET", "/livez"))[0] == 200
        await until_good(durable)
        durable.port = there.port  # an uninvolved replica must find the acknowledged steps
        for way in WAYS:
            assert (await durable.step(way)).status == 200
            assert (await volatile.step(way)).status == 200
        for session in (durable, volatile):
            assert session.outputs == oracle(STEPS[: session.position]).tobytes()


async def until_good(session: Session) -> None:
    """Resend the same step until it is accepted, without any restart."""

    async def is_good() -> bool:
        reply = await session.step()
        assert reply.status == 200 or reply.code == "store_unavailable"
        return reply.status == 200

    await reached(is_good, "a step with the store up")


async def test_server_is_ready_once_the_store_answers_and_exits_if_it_refuses(
    redis: RedisServer, replicas: Replicas, wires: Wires
) -> None:
    address = f"127.0.0.1:{redis.port}/0"
    redis.kill()
    (waiting,) = replicas(1, "--store", f"redis://{address}")
    (refused,) = replicas(1, "--store", f"redis://me:no@{address}")
    for replica in (waiting, refused):
        replica.launch()
    await reached(lambda: answers(wires, waiting.port), "a server without its store")
    assert not await is_ready(waiting.port)
    redis.start()
    await waiting.ready()
    assert (await Session(wires, waiting.port, "stored").open("stored")).status == 201
    assert await refused.ended() == 1
    redis.kill()
    assert (await Session(wires, waiting.port, "other").open("stored")).code == "store_unavailable"
    assert await is_ready(waiting.port), "an outage affects all replicas, so taking them out of service would not help"

    redis.start()
    (at_once,) = replicas(1, "--store", f"redis://me:no@{address}")
    at_once.launch()
    assert await at_once.ended() == 1
    *_, line = at_once.log.read_text().splitlines()  # preceded by a warning about the password in the flag
    assert "check the user and the password" in line


async def answers(wires: Wires, port: int) -> bool:
    try:
        return (await wires.ask(port, "GET", "/livez"))[0] == 200
    except Broken:
        return False


@pytest.mark.parametrize("fsync", ["always", "everysec"])
async def test_sessions_survive_repeated_kills_of_redis(
    tmp_path: Path, servers: Servers, oracle: Oracle, fsync: str
) -> None:
    """Redis is killed and restarted from its file repeatedly. It writes to the file before it replies."""
    redis = RedisServer(tmp_path / "redis", fsync)
    redis.start()
    try:
        cluster = servers(2, store=redis.url)
        async with Crowd([server.port for server in cluster], 3, 20, follows_gaps=fsync == "everysec") as crowd:
            async with crowd.stepping():
                for _ in range(4):
                    await crowd.acknowledged(100)
                    redis.kill()
                    await crowd.hears("store_unavailable")
                    redis.start()
                await crowd.acknowledged(100)
            verdict = await crowd.verdict(oracle)
    finally:
        redis.kill()
    assert verdict.good, verdict.findings


async def test_clients_recover_from_a_restored_older_file(
    redis: RedisServer, servers: Servers, oracle: Oracle, tmp_path: Path
) -> None:
    """Acknowledged steps are lost: clients get the position to continue from, resend, and reach the same state."""
    cluster = servers(2, store=redis.url)
    older = tmp_path / "older"
    async with Crowd([server.port for server in cluster], 5, 20, follows_gaps=True) as crowd:
        async with crowd.stepping():
            await crowd.acknowledged(200)
        redis.stop()
        files = redis.append_only_files
        (shutil.copytree if files.is_dir() else shutil.copy)(files, older)
        redis.start()
        async with crowd.stepping():
            await crowd.acknowledged(300)
        redis.kill()
        files.rename(tmp_path / "newer")
        older.rename(files)
        redis.start()
        crowd.tally.outcomes.clear()
        async with crowd.stepping():
            await crowd.acknowledged(200)
        verdict = await crowd.verdict(oracle)
    assert verdict.good, verdict.findings
    assert crowd.tally.outcomes["position_gap"] >= 10
