"""A short version of `make overload`: a flood from another process, beside a client and a probe."""

from pathlib import Path

from faults import overload


async def test_a_calm_client_and_probes_are_answered_under_a_flood(tmp_path: Path) -> None:
    (row,) = await overload.run(tmp_path, ["bad frames, 8 streams"], seconds=1.0)
    assert "1008" in row.answer or "nothing" in row.answer
    assert len(row.under.steps) > 1
    assert row.under.slowest_probe < 10.0
