"""`make rolling-test`: restart every replica behind a real HAProxy, one after another, while clients step.

Each replica gets SIGTERM, must exit with status 0, and is started again. No step may fail for a client that retries;
the history checker decides. The report has the latencies before and during the restarts.
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

import uvloop
from faults import haproxy, report
from faults.client import Tally
from faults.crowd import Crowd
from faults.haproxy import HAProxy
from faults.history import Verdict
from faults.replica import Replica, tiny_repository
from oracle import Oracle
from redis_server import RedisServer

from deploy import local_redis


@dataclass
class Result:
    """The replicas' exit statuses, and when the restarts began and ended."""

    statuses: list[int]
    verdict: Verdict
    tally: Tally
    began: float
    ended: float

    def __str__(self) -> str:
        restarts = f"{len(self.statuses)} restarts, {sum(map(bool, self.statuses))} with an exit status other than 0"
        return f"{restarts}, {self.verdict}"

    def waits(self) -> str:
        tally, spans = self.tally, {"before": (0.0, self.began), "during": (self.began, self.ended)}
        waited = [
            f"{name} p50 {tally.percentile(50, *span):.1f} ms, p99 {tally.percentile(99, *span):.0f} ms"
            for name, span in spans.items()
        ]
        return f"a step took, {'; '.join(waited)}"


async def run(
    folder: Path, seed: int, *, rounds: int = 1, before: int = 250, sessions: int = 50, pause: float = 0.2
) -> Result:
    """Restart each of three replicas `rounds` times, first after `before` steps."""
    repository = tiny_repository(folder)
    store = RedisServer(folder / "redis")
    store.start()
    cluster = [Replica(f"replica-{i}", repository, folder, "--store", store.url) for i in range(3)]
    proxy = HAProxy(folder, [replica.port for replica in cluster])
    statuses = []
    try:
        await asyncio.gather(*(replica.start() for replica in cluster))
        await proxy.start()
        async with Crowd([proxy.port], seed, sessions, pause=pause) as crowd:
            async with crowd.stepping():
                await crowd.acknowledged(before)
                began = monotonic()
                for replica in cluster * rounds:
                    statuses.append(await replica.terminate())
                    await replica.start()
                ended = monotonic()
            verdict = await crowd.verdict(Oracle(repository, "tiny"))
    finally:
        proxy.stop()
        for replica in cluster:
            replica.kill()
        store.kill()
    return Result(statuses, verdict, crowd.tally, began, ended)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.rolling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="restarts of each replica")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--sessions", type=int, default=200)
    arguments = parser.parse_args(argv)
    if why := local_redis.missing() or haproxy.missing():
        print(f"cannot run: {why}", file=sys.stderr)
        return 2
    print(f"seed {arguments.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="rolling-test-"))
    rolled = run(folder, arguments.seed, rounds=arguments.rounds, before=5000, sessions=arguments.sessions)
    result = uvloop.run(rolled)
    return report.end(result, folder, good=not any(result.statuses))


if __name__ == "__main__":
    raise SystemExit(main())
