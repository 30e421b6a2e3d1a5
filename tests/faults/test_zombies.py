"""A replica stands still for a while, or dies at a chosen place, and others go on with its sessions meanwhile."""

import asyncio
from collections.abc import Awaitable

import numpy as np
import pytest
from faults.conftest import Replicas, start
from faults.crowd import Crowd
from faults.replica import Replica
from faults.wires import WAYS, Reply, Stream, Wires
from oracle import Oracle
from redis_server import RedisServer

from service.core.failpoints import NAMES

X = np.random.default_rng(6).standard_normal((4, 2)).astype(np.float32)


class Session:
    """`a`, stepped by whatever way at whichever replica; told to begin where the test wants."""

    def __init__(self, wires: Wires) -> None:
        self.wires = wires

    def step(self, replica: Replica, position: int, way: str = "raw") -> Awaitable[Reply]:
        x = X[position : position + 1]
        if way == "stream":
            return Stream(self.wires, replica.port, "a").send(x, position)
        return self.wires.send(way, replica.port, "a", x, position)


@pytest.mark.parametrize("way", WAYS)
async def test_the_owner_wakes_up(
    redis_server: RedisServer, replicas: Replicas, wires: Wires, oracle: Oracle, way: str
) -> None:
    """It was stopped with a step of the session unread: that step was taken elsewhere, and another after it."""
    owner, other = cluster = replicas(2, "--store", redis_server.url)
    await start(cluster)
    session = Session(wires)
    await wires.call("POST", owner.port, "/sessions", {"session_id": "a"})
    replies = [await session.step(owner, 0)]
    owner.pause()
    late = asyncio.create_task(session.step(owner, 1, way))
    replies += [await session.step(other, 1), await session.step(other, 2)]
    owner.resume()
    refused = await late
    assert (refused.code, refused.expected) == ("position_too_old", 3)
    replies.append(await session.step(owner, 3))
    assert [reply.position for reply in replies] == [1, 2, 3, 4]
    assert b"".join(reply.outputs for reply in replies) == oracle(X).tobytes()


@pytest.mark.parametrize(
    ("place", "moves_on"), [("before_commit", False), ("before_commit", True), ("after_commit", True)]
)
async def test_the_owner_is_stopped_at_its_commit(
    redis_server: RedisServer, replicas: Replicas, wires: Wires, oracle: Oracle, place: str, moves_on: bool
) -> None:
    """Stopped at its second commit: it computed the step, and so did another replica, which may have gone on since."""
    (owner,) = replicas(1, "--store", redis_server.url, environment={"UNROLL_FAILPOINTS": f"{place}=stop:2"})
    (other,) = replicas(1, "--store", redis_server.url)
    await start([owner, other])
    session = Session(wires)
    await wires.call("POST", other.port, "/sessions", {"session_id": "a"})
    replies = [await session.step(owner, 0)]
    late = asyncio.create_task(session.step(owner, 1))
    await owner.stopped()
    replies.append(await session.step(other, 1))
    if moves_on:
        replies.append(await session.step(other, 2))
    owner.resume()
    reply = await late
    if place == "after_commit" or not moves_on:  # the reply is that of the step, whoever committed it
        assert (reply.outputs, reply.position) == (replies[1].outputs, 2)
    else:
        assert (reply.code, reply.expected) == ("position_too_old", 3)
    replies += [await session.step(owner, position) for position in range(len(replies), 4)]
    assert [reply.position for reply in replies] == [1, 2, 3, 4]
    assert b"".join(reply.outputs for reply in replies) == oracle(X).tobytes()


async def test_a_replica_dies_at_every_place(redis_server: RedisServer, replicas: Replicas, oracle: Oracle) -> None:
    dying, other = replicas(2, "--store", redis_server.url)
    await other.start()
    async with Crowd([dying.port, other.port], 9, 20) as crowd:
        async with crowd.stepping():
            for name in sorted(NAMES):
                dying.environment["UNROLL_FAILPOINTS"] = f"{name}=kill:20"
                await dying.start()
                assert await dying.ended() == -9, name
        verdict = await crowd.verdict(oracle)
    assert verdict.good, verdict.findings


async def test_replicas_stand_still_in_turn(redis_server: RedisServer, replicas: Replicas, oracle: Oracle) -> None:
    cluster = replicas(2, "--store", redis_server.url)
    await start(cluster)
    async with Crowd([replica.port for replica in cluster], 10, 30, timeout=0.3) as crowd:
        async with crowd.stepping():
            for replica in cluster * 3:
                replica.pause()
                await crowd.acknowledged(50)
                replica.resume()
                await crowd.acknowledged(50)
        verdict = await crowd.verdict(oracle)
    assert verdict.good, verdict.findings
