"""`make kill-test`: kill replicas at random times while clients step; no step may be lost or applied twice.

The setup is three `unroll serve`, one redis-server and 200 sessions. Clients send each chunk to random replicas over
HTTP or WebSocket until it is acknowledged. Each replica is killed some time after it is ready and then restarted,
until the number of kills or the time limit is reached. Finally the history checker verifies every session.
"""

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Literal

import uvloop
from faults import report
from faults.client import Tally
from faults.crowd import Crowd
from faults.history import Verdict
from faults.replica import Replica, tiny_repository
from oracle import Oracle
from redis_server import RedisServer

from deploy import local_redis

#: Average seconds from ready to kill, and average pause of a client between steps.
_LIFE, _PAUSE = 0.6, 0.3
#: Settings that split chunks into pieces and make 200 clients exceed a batch.
_HARD = ("--piece-steps", "2", "--max-batch", "32")


@dataclass
class Result:
    kills: int
    verdict: Verdict
    tally: Tally
    crashes: list[str]

    def __str__(self) -> str:
        return f"{self.kills} kills, {self.verdict}"

    def waits(self) -> str:
        return f"a step took {self.tally.percentile(50):.1f} ms at p50, {self.tally.percentile(99):.0f} ms at p99"


async def run(
    folder: Path,
    seed: int,
    *,
    kills: int,
    seconds: float,
    sessions: int = 200,
    capacity: int = 100,
    replicas: int = 3,
    store: Literal["redis", "embedded", "none"] = "redis",
    fsync: str = "everysec",
) -> Result:
    """Run until `kills` or `seconds` is reached; with `kills=0`, for `seconds`.

    Args:
        capacity: Rows per replica: fewer than sessions, so that sessions keep losing their rows.
        store: "none" keeps sessions in memory.
        fsync: Redis's appendfsync, or the embedded store's --store-sync.
    """
    repository = tiny_repository(folder)
    options = (*_HARD, "--session-capacity", str(capacity))
    redis = RedisServer(folder / "redis", fsync) if store == "redis" else None
    if redis is not None:
        redis.start()
        options += ("--store", redis.url)
    elif store == "embedded":
        options += ("--store", f"file://{folder}/store", "--store-sync", fsync)
    cluster = [Replica(f"replica-{i}", repository, folder, *options) for i in range(replicas)]
    killer = _Killer(kills, max(1, replicas - 1), random.Random(seed), monotonic() + seconds)
    try:
        await asyncio.gather(*(replica.start() for replica in cluster))
        async with Crowd([replica.port for replica in cluster], seed, sessions, pause=_PAUSE) as crowd:
            async with crowd.stepping():
                await asyncio.gather(*(killer.haunt(replica) for replica in cluster))
            verdict = await crowd.verdict(Oracle(repository, "tiny"))
    finally:
        for replica in cluster:
            replica.kill()
        if redis is not None:
            redis.kill()
    return Result(killer.done, verdict, crowd.tally, [line for replica in cluster for line in _crashes(replica)])


class _Killer:
    """Kills and restarts replicas, at most `most` at the same time."""

    def __init__(self, wanted: int, most: int, chance: random.Random, end: float) -> None:
        self.done = 0
        self._down = asyncio.Semaphore(most)
        self._wanted, self._chance, self._end = wanted, chance, end

    async def haunt(self, replica: Replica) -> None:
        if not self._wanted:
            await asyncio.sleep(self._end - monotonic())
        while self.done < self._wanted and monotonic() < self._end:
            await asyncio.sleep(self._chance.uniform(0, 2 * _LIFE))
            async with self._down:
                if self.done < self._wanted:
                    replica.kill()
                    self.done += 1
                    if self.done % 50 == 0:
                        print(f"{self.done} kills", flush=True)
                    await replica.start()


def _crashes(replica: Replica) -> list[str]:
    """Return the log lines of a replica that contain a traceback."""
    return [line for line in replica.log.read_text().splitlines() if "Traceback" in line]


async def _watched(arguments: argparse.Namespace, folder: Path) -> Result:
    return await run(
        folder,
        arguments.seed,
        kills=arguments.kills,
        seconds=arguments.seconds,
        sessions=arguments.sessions,
        capacity=arguments.capacity,
        replicas=arguments.replicas,
        store=arguments.store,
        fsync=arguments.fsync,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.kill_loop", description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=1200.0, help="time limit")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--capacity", type=int, default=100, help="rows per replica")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--store", choices=["redis", "embedded", "none"], default="redis")
    parser.add_argument("--fsync", choices=["always", "everysec", "no", "never"], default="everysec")
    arguments = parser.parse_args(argv)
    if why := local_redis.missing():
        print(f"cannot run: {why}", file=sys.stderr)
        return 2
    print(f"seed {arguments.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="kill-test-"))
    result = uvloop.run(_watched(arguments, folder))
    return report.end(result, folder, good=result.kills >= arguments.kills, crashes=result.crashes)


if __name__ == "__main__":
    raise SystemExit(main())
