"""The short version of `make rollout-test`."""

from pathlib import Path

from faults import rollout


async def test_a_version_comes_replica_by_replica_and_the_one_before_it_goes(tmp_path: Path) -> None:
    result = await rollout.run(tmp_path, 14)
    assert result.verdict.good, result.verdict.findings
    assert result.rolled == 1
    assert result.verdict.steps > 200
