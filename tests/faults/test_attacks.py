"""A short version of `make overload`: floods from another process, with calm clients and a probe."""

import statistics
from pathlib import Path

from faults import flood, overload


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
