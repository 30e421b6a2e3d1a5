"""A replica is suspended for a while or dies at a chosen point, and other replicas continue its sessions."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path

import numpy as np
import pytest
from faults.conftest import Replicas, start
from faults.crowd import Crowd
from faults.replica import Replica
from faults.wires import WAYS, Reply, Stream, Wires
from oracle import Oracle
from redis_server import RedisServer

from unroll.service.core.failpoints import NAMES

X = np.random.default_rng(6).standard_normal((4, 2)).astype(np.float32)


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of the store that the replicas share."""
    if request.param == "embedded":
        return f"file://{tmp_path}/store"
    return request.getfixturevalue("redis_server").url


class Session:
    """A session that can be stepped over any protocol, at any replica, from any position."""

    def __init__(self, wires: Wires, name: str) -> None:
        self.wires, self.name = wires, name
        self.replies: list[Reply] = []

    def send(self, replica: Replica, position: int, way: str = "raw") -> Awaitable[Reply]:
        x = X[position : position + 1]
        if way == "stream":
            return Stream(self.wires, replica.port, self.name).send(x, position)
        return self.wires.send(way, replica.port, self.name, x, position)

    async def step(self, *replicas: Replica) -> None:
        """Send the next step to each replica in turn."""
        for replica in replicas:
            self.replies.append(await self.send(replica, len(self.replies)))

    def check(self, oracle: Oracle) -> None:
        assert [reply.position for reply in self.replies] == [1, 2, 3, 4]
        assert b"".join(reply.outputs for reply in self.replies) == oracle(X).tobytes()


@pytest.mark.parametrize("store", ["redis", pytest.param("embedded", marks=pytest.mark.long)], indirect=True)
async def test_resumed_owner_refuses_a_step_run_elsewhere(
    store: str, replicas: Replicas, wires: Wires, oracle: Oracle
) -> None:
    """The owner is suspended with an unread step while another replica runs that step and the next."""
    owner, other = cluster = replicas(2, "--store", store)
    await start(cluster)
    sessions = {way: Session(wires, way) for way in WAYS}
    for session in sessions.values():
        await wires.call("POST", owner.port, "/sessions", {"session_id": session.name})
        await session.step(owner)
    owner.pause()
    late = [asyncio.create_task(session.send(owner, 1, way)) for way, session in sessions.items()]
    for session in sessions.values():
        await session.step(other, other)
    owner.resume()
    assert {(reply.code, reply.expected) for reply in await asyncio.gather(*late)} == {("position_too_old", 3)}
    for session in sessions.values():
        await session.step(owner)
        session.check(oracle)


@pytest.mark.parametrize("store", [pytest.param("redis", marks=pytest.mark.long), "embedded"], indirect=True)
async def test_owner_suspended_at_its_commit_does_not_apply_a_step_twice(
    store: str, replicas: Replicas, wires: Wires, oracle: Oracle
) -> None:
    """The owner is suspended at its second commit. Another replica runs the same step, and in some cases the next."""
    owner, other = replicas(2, "--store", store)
    await other.start()
    for place, moves_on in (("before_commit", False), ("before_commit", True), ("after_commit", True)):
        owner.environment["UNROLL_FAILPOINTS"] = f"{place}=stop:2"
        await owner.start()
        session = Session(wires, f"{place}-{moves_on}")
        await wires.call("POST", other.port, "/sessions", {"session_id": session.name})
        await session.step(owner)
        late = asyncio.create_task(session.send(owner, 1))
        await owner.stopped()
        await session.step(other, *[other] * moves_on)
        owner.resume()
        reply = await late
        if place == "after_commit" or not moves_on:  # the same reply, whichever replica committed the step
            assert (reply.outputs, reply.position) == (session.replies[1].outputs, 2)
        else:
            assert (reply.code, reply.expected) == ("position_too_old", 3)
        await session.step(*[owner] * (4 - len(session.replies)))
        session.check(oracle)
        owner.kill()
        wires.close()  # its connections are broken


async def test_replica_killed_at_any_failpoint_loses_no_step(
    redis_server: RedisServer, replicas: Replicas, oracle: Oracle
) -> None:
    dying, other = replicas(2, "--store", redis_server.url)
    await other.start()
    async with Crowd([dying.port, other.port], 9, 20, pause=0.1) as crowd:
        async with crowd.stepping():
            for name in sorted(NAMES):
                dying.environment["UNROLL_FAILPOINTS"] = f"{name}=kill:8"
                dying.launch()  # it may have ended before the readiness probe
                assert await dying.ended() == -9, name
        verdict = await crowd.verdict(oracle)
    assert verdict.good, verdict.findings


async def test_replicas_suspended_in_turn_lose_no_step(
    redis_server: RedisServer, replicas: Replicas, oracle: Oracle
) -> None:
    cluster = replicas(2, "--store", redis_server.url)
    await start(cluster)
    async with Crowd([replica.port for replica in cluster], 10, 30, timeout=1.0) as crowd:
        async with crowd.stepping():
            for replica in cluster * 2:
                replica.pause()
                await crowd.acknowledged(50)
                replica.resume()
                await crowd.acknowledged(50)
        verdict = await crowd.verdict(oracle)
    assert verdict.good, verdict.findings
