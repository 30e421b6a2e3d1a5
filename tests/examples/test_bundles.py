"""Committed bundles equal a new export of the committed checkpoints, and the doctor's a new export of its seed."""

from pathlib import Path

import pytest

from unroll import bundle
from unroll.examples import bundles
from unroll.service.engine.runner import Runner


@pytest.fixture(scope="module")
def afresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("afresh")
    bundles.main(repository, repository)
    return repository


@pytest.mark.long
@pytest.mark.parametrize("name", ["co2", "bytes", "sound", "load", "policy", "tiny"])
def test_new_export_gives_the_same_numbers(afresh: Path, name: str) -> None:
    folder = bundles.DOCTOR if name == "tiny" else bundles.REPOSITORY
    committed, fresh = bundle.read(folder / name / "1"), bundle.read(afresh / name / "1")
    assert fresh.manifest.state == committed.manifest.state
    assert (fresh.manifest.streamable, fresh.manifest.bit_exact) == (True, True)
    for golden, model in ((committed, fresh), (fresh, committed)):
        bundle.Verifier(Runner(model.model, model.manifest), golden.manifest).replay(golden.golden)


@pytest.mark.parametrize("name", ["co2", "bytes", "sound", "load", "policy"])
def test_bundle_is_small(name: str) -> None:
    assert sum(file.stat().st_size for file in (bundles.REPOSITORY / name / "1").iterdir()) <= 1_000_000
