"""The network does its worst: what was acknowledged is there once, and whoever asks again is answered."""

import random
from collections.abc import Awaitable

import numpy as np
import pytest
from faults.conftest import Servers
from faults.crowd import Crowd
from faults.proxy import CUTS, Fault, FaultProxy
from faults.wires import WAYS, Broken, Reply, Stream, Wires
from oracle import Oracle

X = np.array([[0.25, -0.5], [1.5, 0.75]], np.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", CUTS)
async def test_a_cut_is_answered_by_the_retry(servers: Servers, oracle: Oracle, fault: Fault, way: str) -> None:
    (server,) = servers(1)
    wires = Wires("tiny", ("x", "y"))
    await wires.call("POST", server.port, "/sessions", {"session_id": "a"})
    async with FaultProxy(server.port) as proxy:
        stream = Stream(wires, proxy.port, "a")

        def send(x: np.ndarray, position: int) -> Awaitable[Reply]:
            return stream.send(x, position) if way == "stream" else wires.send(way, proxy.port, "a", x, position)

        await send(X[:1], 0)
        proxy.draw = lambda: fault
        with pytest.raises(Broken):
            await send(X[1:], 1)
        stream.close()
        retry = await wires.send("raw", server.port, "a", X[1:], 1)
    assert (retry.outputs, retry.position) == (oracle(X)[1:].tobytes(), 2)
    assert (await wires.call("GET", server.port, "/sessions/a")).position == 2
    wires.close()


async def test_clients_behind_a_bad_network(servers: Servers, oracle: Oracle) -> None:
    chance = random.Random(4)
    faults = [Fault.NONE] * 30 + [*CUTS, *CUTS, Fault.DELAY, Fault.SILENCE]
    cluster = servers(1)
    proxies = [FaultProxy(server.port, lambda: chance.choice(faults), delay=0.02) for server in cluster]
    async with proxies[0]:
        ports = [proxy.port for proxy in proxies]
        async with Crowd(ports, seed=4, sessions=30, pause=0.005, timeout=0.5) as crowd:
            async with crowd.stepping():
                await crowd.acknowledged(1500)
            for proxy in proxies:
                proxy.draw = lambda: Fault.NONE
            verdict = await crowd.verdict(oracle)
    assert verdict.good, verdict.findings
    assert crowd.told.outcomes.keys() >= {"IncompleteReadError", "ConnectionClosedError", "TimeoutError"}
