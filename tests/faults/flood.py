"""One tenant sends five times a server's capacity; another has twenty calm clients. For `make overload`.

The engine is slowed to 200 steps a second. The flood comes from another process, which reports its answers.
"""

import asyncio
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from faults.open_loop import MODEL, Answers, ask
from faults.replica import ROOT, tiny_repository
from serving import Running, SlowEngine

from unroll.service.access.keys import new_key
from unroll.service.settings import Settings

#: Rows per batch and seconds per batch: 200 steps a second.
_ROWS, _BATCH_SECONDS = 4, 0.02
_CALM_CLIENTS, _CALM_PAUSE = 20, 1.0


@dataclass
class Calm:
    """Measurements of the calm clients, per step. batches: How many batches ended while the step was in flight."""

    seconds: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)


async def step_calmly(running: Running, key: str, calm: Calm, over: asyncio.Future[object]) -> None:
    """Let each client step at intervals, at least once, until the flood ends."""
    counters = running.model(MODEL).scheduler.counters

    async def one(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        await asyncio.wait([over], timeout=_CALM_PAUSE * number / _CALM_CLIENTS)
        first = True
        while first or not over.done():
            sent, before = perf_counter(), counters.batches
            calm.statuses.append(await ask(reader, writer, key))
            calm.seconds.append(perf_counter() - sent)
            calm.batches.append(counters.batches - before)
            first = False
            await asyncio.wait([over], timeout=_CALM_PAUSE)
        writer.close()

    await asyncio.gather(*map(one, range(_CALM_CLIENTS)))


def _serve(folder: Path, *tenants: str) -> tuple[Running, dict[str, str]]:
    """Start a server. Return it, and the key of each tenant."""
    repository = tiny_repository(folder)
    keys = {tenant: new_key(tenant, tenant, ["infer"]) for tenant in tenants}
    file = folder / "keys.toml"
    file.write_text("\n".join(entry for _, entry in keys.values()))
    running = Running(Settings(repository=repository, keys=file, max_batch=_ROWS))
    return running, {tenant: secret for tenant, (secret, _) in keys.items()}


async def _flood(running: Running, key: str, seconds: float) -> asyncio.Future[Answers]:
    """Flood the server from another process. Returns once it has begun."""
    command = [sys.executable, "-m", "faults.open_loop", str(running.port), str(seconds)]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT / "tests", env=os.environ | {"UNROLL_API_KEY": key}, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()

    async def answers() -> Answers:
        return Answers(**json.loads((await process.communicate())[0]))

    return asyncio.ensure_future(answers())


async def run(folder: Path, seconds: float) -> tuple[Calm, Calm, Answers]:
    """Measure the calm clients without and with the flood; also return the flood's answers."""
    running, keys = await asyncio.to_thread(_serve, folder, "calm", "flood")
    alone, under = Calm(), Calm()
    with SlowEngine(running.model(MODEL).loop, _BATCH_SECONDS):
        await step_calmly(running, keys["calm"], alone, asyncio.ensure_future(asyncio.sleep(seconds)))
        flooding = await _flood(running, keys["flood"], seconds)
        await step_calmly(running, keys["calm"], under, flooding)
    await asyncio.to_thread(running.stop)
    return alone, under, flooding.result()


async def shares(folder: Path, floods: Mapping[str, int], seconds: float) -> dict[str, int]:
    """Let each tenant flood from so many processes. Returns the number of its requests that were accepted."""
    running, keys = await asyncio.to_thread(_serve, folder, *floods)
    with SlowEngine(running.model(MODEL).loop, _BATCH_SECONDS):
        flooding = [
            (tenant, await _flood(running, keys[tenant], seconds)) for tenant in floods for _ in range(floods[tenant])
        ]
        accepted = Counter[str]()
        for tenant, answers in flooding:
            accepted[tenant] += len((await answers).seconds["200"])
    await asyncio.to_thread(running.stop)
    return dict(accepted)


def table(alone: Calm, under: Calm, flood: Answers) -> str:
    columns = ("a tenant that floods", "p50/p99, ms", "answers")
    rows = [
        ("20 calm clients alone", alone.seconds),
        ("beside the flood", under.seconds),
        *((f"the flood, {status}", each) for status, each in sorted(flood.seconds.items())),
        (f"refusals after the first, which came after {flood.noticed or 0:.2f} s", flood.refusals),
    ]
    lines = [columns, ("---",) * 3]
    lines += [
        (name, "/".join(f"{1e3 * percentile(each, p):.1f}" for p in (50, 99)), str(len(each))) for name, each in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percentile(values: Sequence[float], share: int) -> float:
    return statistics.quantiles(values, n=100)[share - 1] if len(values) > 1 else values[0]
