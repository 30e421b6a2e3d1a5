"""Network faults: acknowledged steps are applied once, and retries are answered."""

import asyncio
import random
from collections.abc import Awaitable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
from faults.conftest import Servers, start_server
from faults.crowd import Crowd
from faults.proxy import CUTS, Fault, FaultProxy
from faults.wires import WAYS, Broken, Reply, Stream, Wires
from oracle import Oracle
from redis_server import RedisServer
from serving import Running

X = np.array([[0.25, -0.5], [1.5, 0.75]], np.float32)


@pytest.fixture(scope="module")
def pair(tiny: Path, redis_process: RedisServer) -> Iterator[list[Running]]:
    redis_process.flush()
    pair = [start_server(tiny, store=redis_process.url) for _ in range(2)]
    yield pair
    for server in pair:
        server.stop()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", CUTS)
async def test_a_cut_is_answered_by_the_retry(
    pair: list[Running], wires: Wires, oracle: Oracle, fault: Fault, way: str
) -> None:
    """The retry goes to another replica: a cut connection does not show whether the chunk was applied."""
    (server, other), session = pair, f"{fault}-{way}"
    await wires.call("POST", server.port, "/sessions", {"session_id": session})
    async with FaultProxy(server.port) as proxy:
        stream = Stream(wires, proxy.port, session)

        def send(x: np.ndarray, position: int) -> Awaitable[Reply]:
            return stream.send(x, position) if way == "stream" else wires.send(way, proxy.port, session, x, position)

        await send(X[:1], 0)
        proxy.draw = lambda: fault
        with pytest.raises(Broken):
            await send(X[1:], 1)
        stream.close()
        retry = await wires.send("raw", other.port, session, X[1:], 1)
    assert (retry.outputs, retry.position) == (oracle(X)[1:].tobytes(), 2)
    assert (await wires.call("GET", server.port, f"/sessions/{session}")).position == 2


async def test_network_faults_everywhere_lose_no_step(
    servers: Servers, oracle: Oracle, redis_server: RedisServer
) -> None:
    """Faults occur between clients and replicas, and between replicas and their store."""
    chance = random.Random(4)
    faults = [Fault.NONE] * 50 + [*CUTS, Fault.DELAY, Fault.SILENCE]

    def draw() -> Fault:
        return chance.choice(faults)

    async with FaultProxy(redis_server.port, delay=0.02) as store:
        cluster = await asyncio.to_thread(servers, 2, store=f"redis://127.0.0.1:{store.port}/0", store_timeout=0.25)
        async with AsyncExitStack() as stack:
            proxies = [await stack.enter_async_context(FaultProxy(server.port, delay=0.02)) for server in cluster]
            ports = [proxy.port for proxy in proxies]
            async with Crowd(ports, seed=4, sessions=30, pause=0.005, timeout=1.0) as crowd:
                for proxy in (store, *proxies):
                    proxy.draw = draw
                async with crowd.stepping():
                    await crowd.acknowledged(600)
                for proxy in (store, *proxies):
                    proxy.draw = lambda: Fault.NONE
                verdict = await crowd.verdict(oracle)
    assert verdict.good, verdict.findings
    assert crowd.tally.outcomes.keys() >= {"IncompleteReadError", "ConnectionClosedError", "TimeoutError"}
