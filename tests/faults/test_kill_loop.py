"""Short versions of `make kill-test` and related runs: a few kills, restarts, few rows, one new version."""

from pathlib import Path
from typing import Literal

import pytest
from faults import haproxy, kill_loop, rolling, rollout
from faults.conftest import Servers
from faults.crowd import Crowd
from oracle import Oracle
from redis_server import RedisServer


@pytest.mark.parametrize("store", [pytest.param("redis", marks=pytest.mark.long), "embedded"])
async def test_killed_replicas_lose_no_step(tmp_path: Path, store: Literal["redis", "embedded"]) -> None:
    result = await kill_loop.run(tmp_path, 11, kills=3, seconds=250, sessions=40, replicas=2, store=store)
    assert result.verdict.good, result.verdict.findings
    assert not result.crashes
    assert result.kills == 3
    assert result.verdict.steps > 100


@pytest.mark.long
@pytest.mark.skipif(bool(haproxy.missing()), reason=haproxy.missing())
async def test_rolling_restart_behind_haproxy_loses_no_step(tmp_path: Path) -> None:
    result = await rolling.run(tmp_path, 12, sessions=20, before=30)
    assert result.verdict.good, result.verdict.findings
    assert result.statuses == [0, 0, 0]


@pytest.mark.long
async def test_new_version_replaces_the_old_replica_by_replica(tmp_path: Path) -> None:
    result = await rollout.run(tmp_path, 14)
    assert result.verdict.good, result.verdict.findings
    assert result.rolled == 1
    assert result.verdict.steps > 200


async def test_sessions_that_keep_losing_their_rows_continue(
    servers: Servers, oracle: Oracle, redis_server: RedisServer
) -> None:
    """A request must succeed even if its session loses its row while the request waits."""
    cluster = servers(2, store=redis_server.url, session_capacity=4, piece_steps=2)
    async with Crowd([server.port for server in cluster], seed=13, sessions=60, pause=0.01) as crowd:
        async with crowd.stepping():
            await crowd.acknowledged(600)
        verdict = await crowd.verdict(oracle)
    assert verdict.good, verdict.findings
