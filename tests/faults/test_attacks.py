"""A short version of `make overload`: floods from another process, with calm clients and a probe."""

import asyncio
import gc
import statistics
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from time import thread_time

import pytest
from faults import flood, overload
from faults.replica import ROOT, tiny_repository
from serving import Running

from unroll.service.settings import Settings


async def test_a_calm_client_and_probes_are_answered_under_a_flood(tmp_path: Path) -> None:
    (row,) = await overload.run(tmp_path, ["bad frames, 8 streams"], seconds=1.0)
    assert "1008" in row.answer or "nothing" in row.answer
    assert len(row.under.steps) > 1
    assert row.under.slowest_probe < 10.0


async def test_flooding_tenant_is_refused_and_calm_tenant_waits_few_batches(tmp_path: Path) -> None:
    """The engine is much slower than HTTP, so waits are counted in batches."""
    alone, under, answers = await flood.run(tmp_path, seconds=1.5)
    assert {*alone.statuses} == {200}
    assert statistics.median(answers.refusals) < statistics.median(answers.seconds["200"])
    waited = [batches for batches, status in zip(under.batches, under.statuses, strict=True) if status == 200]
    assert waited
    assert max(waited) < 10, "it waited behind the queue of the flooding tenant"


@pytest.mark.long
async def test_flooding_tenants_have_equal_shares_however_much_they_send(tmp_path: Path) -> None:
    accepted = await flood.shares(tmp_path, {"small": 1, "large": 3}, seconds=4.0)
    assert accepted["small"] > 0.35 * sum(accepted.values()), accepted


@pytest.fixture
def frozen_objects() -> Iterator[None]:
    """Spare the garbage collector the objects of other tests, as `unroll serve` spares it those that stay."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.long
@pytest.mark.usefixtures("frozen_objects")
@pytest.mark.parametrize(
    "attack",
    [
        "60 bodies of 16 MiB half sent",
        "60 messages of 16 MiB half sent",
        "frames of unbound handles, 8 streams",
        "opens of 8192 sessions",
    ],
)
async def test_probes_wait_for_short_turns_under_attack(tmp_path: Path, attack: str) -> None:
    """A probe waits for the turns of the event loop; two or three of the longest must fit in 100 ms.

    Processor time counts, because a machine under load must not fail this test.
    """
    running = await asyncio.to_thread(Running, Settings(repository=tiny_repository(tmp_path)))
    loop, turns = running.uvicorn.loop, list[float]()

    def tick() -> None:
        turns.append(thread_time())
        loop.call_soon(tick)

    loop.call_soon_threadsafe(tick)
    command = [sys.executable, "-m", "faults.attacks", attack, str(running.port), "2"]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT / "tests")
    assert await process.wait() == 0
    await asyncio.to_thread(running.stop)
    assert max(after - before for before, after in pairwise(turns)) < 0.04
